"""Slots of a text, and where their tokens stand.

A *slot* counts the tokens of a row, padding included: slot `i` is that of the
token that is written when `cache_update_index` is `i`. That index is one number
for all rows of a batch, or one for each.
"""

import keras
from keras import ops


def slots(index, length):
    """The slots that `length` tokens written at `index` take.

    Args:
        index: int, `()` or `(B,)`.
        length: int.

    Returns:
        int32 tensor `(1, length)` or `(B, length)`.
    """
    first = ops.reshape(ops.cast(index, "int32"), (-1, 1))
    return first + ops.arange(length, dtype="int32")[None]


def is_per_row(index):
    """Whether each row of a batch has an index of its own."""
    return len(getattr(index, "shape", ())) > 0


def start_at(*indices):
    """Where a slice starts, all indices of one dtype.

    JAX wants them so. Python's are int64 to it where `jax_enable_x64` is set.
    """
    if keras.config.backend() != "jax":
        return indices
    return tuple(ops.cast(index, "int32") for index in indices)


def slot_distance(index, length, read):
    """How many slots each of some slots is behind each token.

    Args:
        index: int, `()` or `(B,)`. The slot of the first token.
        length: int. The number of tokens, `T`.
        read: int32 tensor `(B or 1, S)`, slots.

    Returns:
        int32 tensor `(B or 1, T, S)`.
    """
    return slots(index, length)[:, :, None] - read[:, None, :]


def slot_positions(positions, padding_mask, index, read):
    """Where the tokens in a cache stand in the text.

    A cache does not remember it. The tokens of a call stand where the caller
    says. Those of earlier calls are taken to stand one after the other, right
    before the first token of this call that is no padding.

    Args:
        positions: int32 tensor `(B, T)`, the positions of this call's tokens.
        padding_mask: Optional tensor `(B, N)`, 0 for padding, which takes up
            slots but no positions.
        index: int, `()` or `(B,)`. The slot of the first of the tokens.
        read: int32 tensor `(B or 1, S)`. The slots that are asked for.

    Returns:
        An int32 tensor `(B, S)`.
    """
    batch, length = ops.shape(positions)
    first_slot = slots(index, 1)
    read = _of_each_row(read, batch)
    if padding_mask is None:
        before, offset = read, positions[:, :1] - first_slot
    else:
        real = ops.cast(ops.not_equal(padding_mask, 0), "int32")
        before = ops.cumsum(real, axis=1) - real
        written = _of_each_row(slots(index, length), batch)
        offset = positions - ops.take_along_axis(before, written, axis=1)
        first = ops.argmax(
            ops.take_along_axis(real, written, axis=1), axis=1, keepdims=True
        )
        offset = ops.take_along_axis(offset, first, axis=1)
        before = columns(before, read)
    call = ops.clip(read - first_slot, 0, length - 1)
    return ops.where(
        read < first_slot,
        before + offset,
        ops.take_along_axis(positions, call, axis=1),
    )


def columns(x, read):
    """What is said of some slots.

    Args:
        x: Tensor `(B, N)`, of all slots from the first on.
        read: int32 tensor `(B or 1, S)`, slots. Of those that are not there,
            something is returned.

    Returns:
        A tensor `(B, S)`.
    """
    batch, count = ops.shape(x)
    read = ops.clip(_of_each_row(read, batch), 0, count - 1)
    return ops.take_along_axis(x, read, axis=1)


def _of_each_row(x, batch):
    """A tensor `(B or 1, N)` as `(B, N)`."""
    return ops.broadcast_to(x, (batch, ops.shape(x)[1]))
