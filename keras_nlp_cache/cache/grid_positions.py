"""Where tokens stand of which some are those of an image, in a grid.

A token then stands at a time, at a height and at a width. Text stands at the
same of all three, and goes on after an image where its longer side ends. That
is fewer positions than the image has tokens, so from then on a token does not
stand where its slot would say. How far from there is kept with a cache, for
calls that are told nothing of images: a decode step has to know no more.
"""

import keras
from keras import ops

from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.policies.state import State
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.cache.shared_inputs import Positions
from keras_nlp_cache.cache.shared_inputs import Weightless
from keras_nlp_cache.cache.slots import columns
from keras_nlp_cache.cache.slots import slots

# Of each row one number, and nothing.
OFFSET_SHAPES = StateShapes((1,), (0,))


class GridPositions(Positions):
    """Where each token stands in the text, or in a grid.

    Call arguments are those of `Positions`, and:
        grid_positions: Optional int `(B, 4, T)`: the place of each token in the
            text, which is not looked at, then its time, height and width.
        offset: Optional `State` of `(B, 1)`: how far behind their slots the
            tokens of a text that goes on stand.

    Returns:
        int32 `(B, T, 3)` with `grid_positions`, and else as `Positions`.
    """

    def call(
        self,
        token_ids,
        index=None,
        token_positions=None,
        attention_mask=None,
        grid_positions=None,
        offset=None,
    ):
        if grid_positions is not None:
            places = ops.cast(grid_positions[:, 1:], "int32")
            return ops.swapaxes(places, 1, 2)
        positions = super().call(
            token_ids, index, token_positions, attention_mask
        )
        if offset is None or token_positions is not None:
            return positions
        return positions + ops.cast(_going_on(offset, index), "int32")

    def compute_output_spec(self, token_ids, *args, **kwargs):
        return keras.KerasTensor((None, token_ids.shape[1]), "int32")


class PositionOffset(Weightless):
    """How far from their slots the tokens stand that come after a call.

    Call arguments:
        offset: Optional `State` of `(B, 1)`, what it was before. `None` without
            a cache.
        positions: What `GridPositions` returned.
        grid_positions: Optional, as for `GridPositions`. Without these nothing
            changes.
        index: Optional int, `()` or `(B,)`, the slot at which the call writes.
        padding_mask: Optional tensor, 0 for padding, one column for each slot.

    Returns:
        A `State`, or `None`.
    """

    def call(
        self,
        offset,
        positions,
        grid_positions=None,
        index=None,
        padding_mask=None,
    ):
        if offset is None:
            return None
        after = _going_on(offset, index)
        if grid_positions is not None:
            place = slots(index, ops.shape(positions)[1])
            place = ops.broadcast_to(place, ops.shape(positions)[:2])
            if padding_mask is not None:
                real = ops.not_equal(columns(padding_mask, place), 0)
                place = ops.where(real, place, -1)
            last = ops.argmax(place, axis=1, keepdims=True)
            slot = ops.take_along_axis(place, last, axis=1)
            stands = ops.take_along_axis(
                ops.max(positions, axis=2), last, axis=1
            )
            after = ops.where(
                slot >= 0, ops.cast(stands - slot, after.dtype), after
            )
        return State(access().replace(offset.stored, after))

    def compute_output_spec(self, offset, *args, **kwargs):
        return keras.KerasTensor(offset.shape, offset.dtype)


def _going_on(offset, index):
    """The offset of a text that goes on, 0 of one that begins, `(B, 1)`."""
    goes_on = ops.reshape(index, (-1, 1)) != 0
    return ops.where(goes_on, offset.stored, ops.zeros_like(offset.stored))
