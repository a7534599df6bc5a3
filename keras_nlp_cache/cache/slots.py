"""Slots of a cache, and where in the text their tokens stand.

A *slot* is an index into the `max_length` places of a cache. Slot `i` holds the
token that was written when `cache_update_index` was `i`.
"""

import keras
from keras import ops


def slots(index, length):
    """The slots that `length` tokens written at `index` take, `(length,)`."""
    return ops.arange(length, dtype="int32") + ops.cast(index, "int32")


def start_at(*indices):
    """Where a slice starts, all indices of one dtype.

    JAX wants them so. Python's are int64 to it where `jax_enable_x64` is set.
    """
    if keras.config.backend() != "jax":
        return indices
    return tuple(ops.cast(index, "int32") for index in indices)


def slot_distance(index, length, max_length):
    """How many slots each slot is behind each token, int32 `(T, S)`."""
    return slots(index, length)[:, None] - slots(0, max_length)[None, :]


def slot_positions(positions, padding_mask, index, max_length):
    """Where the tokens in a cache stand in the text.

    A cache does not remember it. The tokens of a call stand where the caller
    says. Those of earlier calls are taken to stand one after the other, right
    before the first token of this call that is no padding.

    Args:
        positions: int32 tensor `(B, T)`, the positions of this call's tokens.
        padding_mask: Optional tensor `(B, S)`, 0 for padding, which takes up
            slots but no positions.
        index: int scalar. The slot of the first of the tokens.
        max_length: int. The number of slots, `S`.

    Returns:
        An int32 tensor `(B, S)`.
    """
    length = ops.shape(positions)[1]
    everywhere = slots(0, max_length)
    if padding_mask is None:
        before, offset = everywhere[None, :], positions[:, :1] - index
    else:
        real = ops.cast(ops.not_equal(padding_mask, 0), "int32")
        before = ops.cumsum(real, axis=1) - real
        written = slots(index, length)
        offset = positions - ops.take(before, written, axis=1)
        first = ops.argmax(
            ops.take(real, written, axis=1), axis=1, keepdims=True
        )
        offset = ops.take_along_axis(offset, first, axis=1)
    call = ops.clip(everywhere - index, 0, length - 1)
    return ops.where(
        (everywhere < index)[None, :],
        before + offset,
        ops.take(positions, call, axis=1),
    )
