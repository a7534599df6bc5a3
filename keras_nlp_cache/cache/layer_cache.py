"""What a key/value cache is, and the one verb that changes it.

A *cache* is a tuple with one `(key, value)` pair of tensors per decoder block,
each of shape `(batch, key_value_heads, max_length, head_dim)`. Heads come
before positions so that the slots of one head lie next to each other in
memory: on XLA:CPU that makes a decode step three times as fast as the
`(batch, max_length, heads, head_dim)` layout.

A *slot* is an index into `max_length`. Slot `i` holds the token that was
written when `cache_update_index` was `i`.
"""

import contextlib
import contextvars
import typing

import keras
from keras import ops

# Added to the logits of slots that may not be attended. Large enough to vanish
# in a softmax, small enough that several of them can be summed in float32.
MASKED = -1e9

_owned = contextvars.ContextVar("keras_nlp_cache_owned", default=False)


@contextlib.contextmanager
def owned_cache():
    """Declares that the caches used in this scope belong to the caller.

    A backbone call never modifies the cache passed to it. A decode loop that
    made its own cache does not need the old one, so inside this scope the
    PyTorch backend writes new keys and values into the tensors it was given.
    On JAX and TensorFlow arrays are immutable and the compiler does the same;
    on TensorFlow in an operation of XLA's that has no gradient.
    """
    token = _owned.set(True)
    try:
        yield
    finally:
        _owned.reset(token)


def is_owned():
    """Whether the caches of this scope belong to the caller."""
    return _owned.get()


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


def causal_mask(index, length, max_length, window=None):
    """Additive mask that hides the future, and the past beyond a window.

    Args:
        index: int scalar. The slot of the first query.
        length: int. The number of queries, `T`.
        max_length: int. The number of slots, `S`.
        window: Optional int. A query sees itself and the `window - 1` slots
            before it. Defaults to `None`, all of them.

    Returns:
        A float32 tensor `(T, S)`: 0 where attended, `MASKED` elsewhere.
    """
    distance = slot_distance(index, length, max_length)
    seen = distance >= 0
    if window is not None:
        seen = ops.logical_and(seen, distance < window)
    return additive(seen)


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


def additive(seen):
    """Turns a boolean mask (`True` where attended) into an additive one."""
    return ops.where(
        ops.cast(seen, "bool"),
        ops.cast(0.0, "float32"),
        ops.cast(MASKED, "float32"),
    )


class LayerCache(typing.NamedTuple):
    """One layer's share of a call: its entry, and what all layers share.

    Every field may be `None`. Without a key and a value there is nothing to
    remember. Without a mask there is nothing of ours to do at all, and
    upstream's own code runs.

    Args:
        key: Tensor `(B, key_value_heads, S, head_dim)`.
        value: Tensor `(B, key_value_heads, S, head_dim)`.
        index: int32 scalar. The slot at which this call starts to write.
        positions: int32 tensor `(B or 1, T)`. Where each token stands in the
            text, for rotary and learned position embeddings.
        mask: float32 tensor `(B or 1, 1, T, S)`, added to the logits. If the
            layer has a window, the mask hides what is beyond it.
        distance: int32 tensor `(B or 1, T, S)`. How many positions each slot
            stands behind each token, for layers that ask for it.
    """

    key: typing.Any = None
    value: typing.Any = None
    index: typing.Any = None
    positions: typing.Any = None
    mask: typing.Any = None
    distance: typing.Any = None

    @property
    def in_use(self):
        return self.mask is not None

    @classmethod
    def of_pair(cls, pair, index, length, window=None):
        """Completes a bare `(key, value)` pair for a layer called by hand."""
        if index is None:
            raise ValueError(
                "Expected the slot of the first token, the argument that ends "
                "in `cache_update_index`, with a cache. Received: None. Pass "
                "0 to fill an empty cache."
            )
        key, value = pair
        total = ops.shape(key)[2]
        return cls(
            key=key,
            value=value,
            index=index,
            positions=slots(index, length)[None, :],
            mask=causal_mask(index, length, total, window)[None, None],
            distance=slot_distance(index, length, total)[None],
        )

    @classmethod
    def without_memory(cls, attention_mask, length, window=None):
        """What a layer needs that sees all of a text at once.

        Args:
            attention_mask: Tensor `(B, T, T)`, 0 where not attended.
            length: int, `T`.
            window: Optional int. See `causal_mask()`.
        """
        mask = additive(attention_mask)[:, None]
        if window is not None:
            mask = mask + causal_mask(0, length, length, window)
        return cls(
            positions=slots(0, length)[None, :],
            mask=mask,
            distance=slot_distance(0, length, length)[None],
        )

    def update(self, key, value):
        """Remembers the keys and values of this call's tokens.

        Args:
            key: Tensor `(B, key_value_heads, T, head_dim)`.
            value: Tensor `(B, key_value_heads, T, head_dim)`.

        Returns:
            The `LayerCache` that holds all keys and values up to now: those
            of the cache with the new ones written at `index`, or just the new
            ones if there is no cache.
        """
        if self.key is None:
            return self._replace(key=key, value=value)
        return self._replace(
            key=_write(self.key, key, self.index),
            value=_write(self.value, value, self.index),
        )


def _write(slots_of_head, update, index):
    update = ops.cast(update, slots_of_head.dtype)
    if keras.config.backend() == "tensorflow" and not is_owned():
        return _write_differentiably(slots_of_head, update, index)
    if keras.config.backend() != "torch":
        return ops.slice_update(slots_of_head, start_at(0, 0, index, 0), update)
    # `ops.slice_update` reads the index back into Python on torch; an index
    # kernel leaves it on the device.
    where = ops.cast(slots(index, update.shape[2]), "int64")
    if is_owned():
        return slots_of_head.index_copy_(2, where, update)
    return slots_of_head.index_copy(2, where, update)


def _write_differentiably(slots_of_head, update, index):
    """`ops.slice_update` in operations that TensorFlow can derive and export.

    What Keras makes of that is XLA's alone.
    """
    import tensorflow as tf

    index, length = ops.cast(index, "int32"), ops.shape(update)[2]
    if tf.executing_eagerly():
        before = slots_of_head[:, :, :index]
        after = slots_of_head[:, :, index + length :]
        return tf.concat([before, update, after], axis=2)
    # Compiled, no shape may depend on the index.
    row = slots(0, ops.shape(slots_of_head)[2]) - index
    written = ops.logical_and(row >= 0, row < length)[:, None]
    rows = ops.take(update, ops.clip(row, 0, length - 1), axis=2)
    return ops.where(written, rows, slots_of_head)
