"""What every layer that remembers needs in one call, computed once.

The only layers that a cached backbone has beyond upstream's. They have no
weights, so files written by either package load in the other. Where there is no
cache, no `token_positions` and no `attention_mask`, all return `None`:
upstream's own code then does all that is to be done.
"""

import keras
from keras import ops

from keras_nlp_cache.cache import kept
from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.masks import causal_mask
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.cache.slots import columns
from keras_nlp_cache.cache.slots import slot_distance
from keras_nlp_cache.cache.slots import slot_positions
from keras_nlp_cache.cache.slots import slots


class Weightless(keras.layers.Layer):
    """A layer with nothing that would be computed again for a gradient.

    What it computes is not of its dtype.

    Attributes:
        called_on_nothing: bool. Whether it is called even if the first of the
            tensors that it takes is `None`.
    """

    called_on_nothing = True

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call


class Positions(Weightless):
    """Where each token stands in the text.

    Call arguments:
        token_ids: Tensor `(B, T)`. Only its shape is used.
        index: Optional int, `()` or `(B,)`, the slot at which the call writes.
        token_positions: Optional int tensor `(B, T)`.
        attention_mask: Optional tensor. Only whether there is one matters.

    Returns:
        int32, `(B, T)` if positions were given, or an index for each row, and
        else `(1, T)`. `None` if there is nothing of ours to do.
    """

    def call(
        self, token_ids, index=None, token_positions=None, attention_mask=None
    ):
        if token_positions is not None:
            return ops.cast(token_positions, "int32")
        if index is None and attention_mask is None:
            return None
        index = 0 if index is None else index
        return slots(index, ops.shape(token_ids)[1])

    def compute_output_spec(
        self, token_ids, index=None, token_positions=None, attention_mask=None
    ):
        return keras.KerasTensor((None, token_ids.shape[1]), "int32")


class Behind:
    """How far behind the tokens of a call stand those that it may attend to.

    Takes the call arguments of `AttentionMask`, with positions that are not
    `None`.

    Attributes:
        read: int32 `(B or 1, S)`. The slots that attention reads.
        in_slots: int32 `(B or 1, T, S)`. How many slots they are behind.
        are_slots: bool. Whether positions are slots.
    """

    def __init__(self, positions, padding_mask, key, index, token_positions):
        length = ops.shape(positions)[1]
        self._index = 0 if index is None else index
        self._positions, self._padding_mask = positions, padding_mask
        self.are_slots = token_positions is None
        self.read = slots(0, length)
        if key is not None:
            self.read = kept.read_slots(key, self._index, length)
        self.in_slots = slot_distance(self._index, length, self.read)

    def in_positions(self):
        """How many positions of the text they are behind."""
        if self.are_slots:
            return self.in_slots
        keys = slot_positions(
            self._positions, self._padding_mask, self._index, self.read
        )
        return self._positions[:, :, None] - keys[:, None, :]


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
        behind = Behind(positions, padding_mask, key, index, token_positions)
        distance = behind.in_positions()
        nearer = kept.nearer(key, index, positions.shape[1])
        if nearer is None:
            return distance
        is_first = behind.read[:, None, :] < key.count
        return ops.where(is_first, distance - nearer[:, :, None], distance)

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
        return keras.KerasTensor((None, length, max_length), "int32")


class AttentionMask(Weightless):
    """What each token may attend to.

    Args:
        window: Optional int. A token sees those that stand less than so many
            positions before it. Positions are slots, unless others are given:
            then those of `slot_positions()`.

    Call arguments:
        positions: What `Positions` returned.
        padding_mask: Optional tensor, 0 for padding: one column for each slot
            with a cache, `(B, T)` without one.
        key: Optional, what is kept of the first layer's keys. It says which
            slots attention reads.
        index: Optional int, `()` or `(B,)`, the slot at which the call writes.
        attention_mask: Optional tensor, `(B, T)` and one column for each slot.
            Boolean or integer, 0 where a query may not attend; or floating,
            added to the logits. It can hide more than the causal mask does,
            never less.
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
        behind = Behind(positions, padding_mask, key, index, token_positions)
        return self.hide(
            self.causal(behind), behind, padding_mask, key, attention_mask
        )

    def hide(self, mask, behind, padding_mask, key, attention_mask):
        """Hides beside what a mask does what is told, and what is not kept.

        Args:
            mask: float32, `(B or 1, 1, T, S)`.
            behind: A `Behind`.
            padding_mask: As for `call()`, like the next two.
            key: Optional.
            attention_mask: Optional.
        """
        if padding_mask is not None:
            padding_mask = _read(padding_mask, key, behind.read)
            mask = mask + additive(padding_mask)[:, None, None, :]
        if attention_mask is not None:
            if not keras.backend.is_float_dtype(attention_mask.dtype):
                attention_mask = additive(attention_mask)
            attention_mask = _read(attention_mask, key, behind.read)
            mask = mask + ops.cast(attention_mask, "float32")[:, None]
        seen = kept.sees(key, behind.read, behind.in_slots)
        if seen is not None:
            mask = mask + additive(seen)[:, None]
        if attention_mask is not None:
            # A softmax over infinities would not be a number.
            mask = ops.maximum(mask, 4 * MASKED)
        return mask

    def causal(self, behind):
        """Hides what follows each token, and what is beyond a window.

        Args:
            behind: A `Behind`.

        Returns:
            float32, `(B or 1, 1, T, S)`.
        """
        if behind.are_slots:
            return causal_mask(behind.in_slots, self.window)[:, None]
        mask = causal_mask(behind.in_slots)[:, None]
        if self.window is not None:
            near = behind.in_positions() < self.window
            mask = mask + additive(near)[:, None]
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
        return keras.KerasTensor((None, 1, length, max_length))


def _read(x, key, read):
    """Of something with a column for each slot, those that attention reads."""
    if not kept.has_policy(key):
        return x
    if len(x.shape) == 2:
        return columns(x, read)
    batch, length, count = ops.shape(x)
    return ops.reshape(
        columns(
            ops.reshape(x, (batch * length, count)),
            ops.repeat(
                ops.broadcast_to(read, (batch, ops.shape(read)[1])),
                length,
                axis=0,
            ),
        ),
        (batch, length, -1),
    )
