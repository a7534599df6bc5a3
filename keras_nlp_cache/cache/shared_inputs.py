"""What every layer that remembers needs in one call, computed once.

The only layers that a cached backbone has beyond upstream's. They have no
weights, so files written by either package load in the other. Where there is no
cache, no `token_positions` and no `attention_mask`, all return `None`:
upstream's own code then does all that is to be done.
"""

import keras
from keras import ops

from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.masks import causal_mask
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.cache.slots import slot_distance
from keras_nlp_cache.cache.slots import slot_positions
from keras_nlp_cache.cache.slots import slots


class Weightless(keras.layers.Layer):
    """A layer with nothing that would be computed again for a gradient.

    What it computes is not of its dtype.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call


class Positions(Weightless):
    """Where each token stands in the text.

    Call arguments:
        token_ids: Tensor `(B, T)`. Only its shape is used.
        index: Optional int scalar, the slot at which the call writes.
        token_positions: Optional int tensor `(B, T)`.
        attention_mask: Optional tensor. Only whether there is one matters.

    Returns:
        int32, `(B, T)` if positions were given and else `(1, T)`. `None` if
        there is nothing of ours to do.
    """

    def call(
        self, token_ids, index=None, token_positions=None, attention_mask=None
    ):
        if token_positions is not None:
            return ops.cast(token_positions, "int32")
        if index is None and attention_mask is None:
            return None
        index = 0 if index is None else index
        return slots(index, ops.shape(token_ids)[1])[None, :]

    def compute_output_spec(
        self, token_ids, index=None, token_positions=None, attention_mask=None
    ):
        batch, length = token_ids.shape
        shared = token_positions is None
        return keras.KerasTensor((1 if shared else batch, length), "int32")


def _distance(positions, padding_mask, key, index, token_positions):
    """How many positions each slot stands behind each token, `(B or 1, T, S)`.

    Takes the call arguments of `Distance`, with positions that are not `None`.
    """
    length = ops.shape(positions)[1]
    max_length = length if key is None else ops.shape(key)[2]
    index = 0 if index is None else index
    if token_positions is None:
        return slot_distance(index, length, max_length)[None]
    keys = positions
    if key is not None:
        keys = slot_positions(positions, padding_mask, index, max_length)
    return positions[:, :, None] - keys[:, None, :]


class Distance(Weightless):
    """How far back in the text each slot stands, for layers that ask for it.

    Call arguments are those of `AttentionMask`.

    Returns:
        int32, `(B or 1, T, S)`: the position of a token less that of a slot.
        `None` if there are no positions.
    """

    def call(
        self,
        positions,
        padding_mask=None,
        key=None,
        index=None,
        token_positions=None,
    ):
        if positions is None:
            return None
        return _distance(positions, padding_mask, key, index, token_positions)

    def compute_output_spec(
        self,
        positions,
        padding_mask=None,
        key=None,
        index=None,
        token_positions=None,
    ):
        length = positions.shape[1]
        max_length = length if key is None else key.shape[2]
        batch = 1 if token_positions is None else None
        return keras.KerasTensor((batch, length, max_length), "int32")


class AttentionMask(Weightless):
    """What each token may attend to.

    Args:
        window: Optional int. A token sees those that stand less than so many
            positions before it. Positions are slots, unless others are given:
            then those of `slot_positions()`.

    Call arguments:
        positions: What `Positions` returned.
        padding_mask: Optional tensor, 0 for padding: `(B, S)` with a cache,
            `(B, T)` without one.
        key: Optional tensor `(B, heads, S, head_dim)`, the first block's keys.
            Only its shape is used.
        index: Optional int scalar, the slot at which the call writes.
        attention_mask: Optional tensor `(B, T, S)`. Boolean or integer, 0
            where a query may not attend; or floating, added to the logits. It
            can hide more than the causal mask does, never less.
        token_positions: Optional int tensor `(B, T)`, for a window.

    Returns:
        float32, `(B or 1, 1, T, S)`, to be added to the attention logits.
        `None` if there are no positions.
    """

    def __init__(self, window=None, **kwargs):
        super().__init__(**kwargs)
        self.window = window

    def call(
        self,
        positions,
        padding_mask=None,
        key=None,
        index=None,
        attention_mask=None,
        token_positions=None,
    ):
        if positions is None:
            return None
        length = ops.shape(positions)[1]
        max_length = length if key is None else ops.shape(key)[2]
        index = 0 if index is None else index
        window = self.window if token_positions is None else None
        mask = causal_mask(index, length, max_length, window)[None, None]
        if self.window is not None and token_positions is not None:
            distance = _distance(
                positions, padding_mask, key, index, token_positions
            )
            mask = mask + additive(distance < self.window)[:, None]
        if padding_mask is not None:
            mask = mask + additive(padding_mask)[:, None, None, :]
        if attention_mask is not None:
            if not keras.backend.is_float_dtype(attention_mask.dtype):
                attention_mask = additive(attention_mask)
            mask = mask + ops.cast(attention_mask, "float32")[:, None]
            # A softmax over infinities would not be a number.
            mask = ops.maximum(mask, 4 * MASKED)
        return mask

    def compute_output_spec(
        self,
        positions,
        padding_mask=None,
        key=None,
        index=None,
        attention_mask=None,
        token_positions=None,
    ):
        length = positions.shape[1]
        max_length = length if key is None else key.shape[2]
        given = (padding_mask, attention_mask, token_positions)
        batch = 1 if all(x is None for x in given) else None
        return keras.KerasTensor((batch, 1, length, max_length))
