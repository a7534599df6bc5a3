"""How a call reads and writes a cache.

A backbone call never modifies the cache that is passed to it, can be derived
and exported, and reads all slots. A decode loop made its own cache, needs the
old one no more, and knows how much of it is in use. So it says with
`accessing()` how its calls are to be made.
"""

import contextlib
import contextvars

import keras
from keras import ops

from keras_nlp_cache.cache.slots import slots
from keras_nlp_cache.cache.slots import start_at


class Access:
    """Access to a cache that belongs to the caller: nothing is modified.

    Of weights, those that not all tokens need are copied.

    Attributes:
        most_choices: int. How often tokens may choose experts, for each expert
            there is, for it to be quicker to compute those that were chosen.
        experts: What computes chosen experts, `None` for
            `experts.mixture.together()`.
    """

    most_choices = 1
    experts = None

    def write(self, entry, update, index):
        """Writes keys or values into slots.

        Args:
            entry: Tensor `(B, key_value_heads, S, head_dim)`.
            update: Tensor `(B, key_value_heads, T, head_dim)`.
            index: int scalar. The slot of the first token.

        Returns:
            `entry` with `update` in it, in the dtype of `entry`.
        """
        update = ops.cast(update, entry.dtype)
        if keras.config.backend() == "tensorflow":
            return _write_differentiably(entry, update, index)
        if keras.config.backend() == "torch":
            # `ops.slice_update` reads the index back into Python; an index
            # kernel leaves it on the device.
            where = ops.cast(slots(index, update.shape[2]), "int64")
            return entry.index_copy(2, where, update)
        return ops.slice_update(entry, start_at(0, 0, index, 0), update)

    def attention(self, cache, length):
        """What attends to a cache in place of `attend()`.

        Args:
            cache: A `LayerCache`, before it is updated.
            length: int. How many tokens the call has.

        Returns:
            A function with the arguments of `attend()`, or `None` for that.
        """

    def project(self, dense, x):
        """Calls the layer that projects what all heads return."""
        return dense(x)

    def logits(self, embedding, hidden_states):
        """Turns hidden states `(B, T, hidden_dim)` into logits."""
        return embedding(hidden_states, reverse=True)


_of_the_caller = Access()
_access = contextvars.ContextVar("keras_nlp_cache_access", default=None)


@contextlib.contextmanager
def accessing(how):
    """In this scope, caches are read and written in some way.

    Args:
        how: An `Access`.
    """
    token = _access.set(how)
    try:
        yield
    finally:
        _access.reset(token)


def access():
    """The `Access` of this scope."""
    return _access.get() or _of_the_caller


def _write_differentiably(entry, update, index):
    """`ops.slice_update` in operations that TensorFlow can derive and export.

    What Keras makes of that is XLA's alone.
    """
    import tensorflow as tf

    index, length = ops.cast(index, "int32"), ops.shape(update)[2]
    if tf.executing_eagerly():
        before, after = entry[:, :, :index], entry[:, :, index + length :]
        return tf.concat([before, update, after], axis=2)
    # Compiled, no shape may depend on the index.
    row = slots(0, ops.shape(entry)[2]) - index
    written = ops.logical_and(row >= 0, row < length)[:, None]
    rows = ops.take(update, ops.clip(row, 0, length - 1), axis=2)
    return ops.where(written, rows, entry)
