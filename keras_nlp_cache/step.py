"""What every decoder block of one call needs, computed once."""

import keras
from keras import ops

from keras_nlp_cache.cache import additive
from keras_nlp_cache.cache import causal_mask
from keras_nlp_cache.cache import MASKED
from keras_nlp_cache.cache import slots


class PositionsAndMask(keras.layers.Layer):
    """Turns the optional inputs of a backbone into positions and a mask.

    The only layer that a cached backbone has beyond upstream's. It has no
    weights, so files written by either package load in the other.

    Call arguments:
        token_ids: Tensor `(B, T)`. Only its shape is used.
        padding_mask: Optional tensor, 0 for padding: `(B, S)` with a cache,
            `(B, T)` without one.
        key: Optional tensor `(B, heads, S, head_dim)`, the first block's keys.
            Only its shape is used.
        index: Optional int scalar, the slot at which the call writes.
        token_positions: Optional int tensor `(B, T)`.
        attention_mask: Optional tensor `(B, T, S)`. Boolean or integer, 0
            where a query may not attend; or floating, added to the logits. It
            can hide more than the causal mask does, never less.

    Returns:
        `(positions, mask)`. `positions` is int32, `(B, T)` if they were given
        and else `(1, T)`; `mask` is float32, `(B or 1, 1, T, S)`, and is to be
        added to the attention logits. Both are `None` if there is no cache, no
        `token_positions` and no `attention_mask`: upstream's own code then
        does all that is to be done.
    """

    def __init__(self, **kwargs):
        # What it computes is int32 and float32, whatever its dtype.
        super().__init__(autocast=False, **kwargs)

    def call(
        self,
        token_ids,
        padding_mask=None,
        key=None,
        index=None,
        token_positions=None,
        attention_mask=None,
    ):
        if key is None and token_positions is None and attention_mask is None:
            return None, None
        length = ops.shape(token_ids)[1]
        max_length = length if key is None else ops.shape(key)[2]
        index = 0 if index is None else index

        positions = token_positions
        if positions is None:
            positions = slots(index, length)[None, :]
        mask = causal_mask(index, length, max_length)[None, None]
        if padding_mask is not None:
            mask = mask + additive(padding_mask)[:, None, None, :]
        if attention_mask is not None:
            if not keras.backend.is_float_dtype(attention_mask.dtype):
                attention_mask = additive(attention_mask)
            mask = mask + ops.cast(attention_mask, "float32")[:, None]
            # A softmax over infinities would not be a number.
            mask = ops.maximum(mask, 4 * MASKED)
        return ops.cast(positions, "int32"), mask

    def compute_output_spec(
        self,
        token_ids,
        padding_mask=None,
        key=None,
        index=None,
        token_positions=None,
        attention_mask=None,
    ):
        batch, length = token_ids.shape
        max_length = length if key is None else key.shape[2]
        shared = token_positions is None
        positions = keras.KerasTensor((1 if shared else batch, length), "int32")
        shared = padding_mask is None and attention_mask is None
        mask = keras.KerasTensor(
            (1 if shared else batch, 1, length, max_length)
        )
        return positions, mask
