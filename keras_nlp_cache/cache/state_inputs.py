"""What layers with a state need in one call, computed once."""

import keras
from keras import ops

from keras_nlp_cache.cache.shared_inputs import Weightless
from keras_nlp_cache.cache.slots import columns
from keras_nlp_cache.cache.slots import slots


class RealTokens(Weightless):
    """Which tokens of a call are text, and not padding.

    Call arguments:
        positions: What `Positions` returned. Only its shape is used.
        padding_mask: Optional tensor, 0 for padding: one column for each slot
            with a cache, `(B, T)` without one.
        index: Optional int, `()` or `(B,)`, the slot at which the call writes.

    Returns:
        bool `(B, T)`. `None` if nobody speaks of padding, or there are no
        positions.
    """

    def call(self, positions, padding_mask=None, index=None):
        if positions is None or padding_mask is None:
            return None
        index = 0 if index is None else index
        here = slots(index, ops.shape(positions)[1])
        return ops.not_equal(columns(padding_mask, here), 0)

    def compute_output_spec(self, positions, padding_mask=None, index=None):
        return keras.KerasTensor((None, positions.shape[1]), "bool")
