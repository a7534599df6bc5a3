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

from keras_nlp_cache.cache.slots import is_per_row
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

    def write(self, kept, update, index):
        """Writes keys or values into places that lie side by side.

        Args:
            kept: Tensor `(B, key_value_heads, S, head_dim)`.
            update: Tensor `(B, key_value_heads, T, head_dim)`.
            index: int, `()` or `(B,)`. The place of the first token, in all
                rows or in each.

        Returns:
            `kept` with `update` in it, in the dtype of `kept`.
        """
        update = ops.cast(update, kept.dtype)
        backend = keras.config.backend()
        if backend == "tensorflow":
            return _write_differentiably(kept, update, index)
        if backend == "jax":
            return write_with_jax(kept, update, index)
        if backend == "torch":
            return write_with_torch(
                kept.clone(), update, slots(index, update.shape[2])
            )
        return self.put(kept, update, slots(index, ops.shape(update)[2]))

    def put(self, kept, update, places):
        """Writes keys or values into any places.

        Args:
            kept: Tensor `(B, key_value_heads, S, head_dim)`.
            update: Tensor `(B, key_value_heads, T, head_dim)`.
            places: int32 `(B or 1, T)`. The place of each token, no two alike.

        Returns:
            `kept` with `update` in it, in the dtype of `kept`.
        """
        update = ops.cast(update, kept.dtype)
        if keras.config.backend() == "torch":
            return write_with_torch(kept.clone(), update, places)
        # The last token that is at a place, if there is one.
        is_at = places[:, None, :] == slots(0, ops.shape(kept)[2])[:, :, None]
        source = ops.argmax(ops.cast(is_at, "int32"), axis=2)
        return _where(ops.any(is_at, axis=2), update, source, kept)

    def replace(self, state, new):
        """Writes all of a state.

        Args:
            state: Tensor `(B, ...)`.
            new: Tensor of its shape.

        Returns:
            `new`, in the dtype of `state`.
        """
        return ops.cast(new, state.dtype)

    def attention(self, cache, length):
        """What attends to a cache in place of `attend()`.

        Args:
            cache: A `LayerCache`, before it is updated.
            length: int. How many tokens the call has.

        Returns:
            A function with the arguments of `attend()`, or `None` for that.
        """

    def call_block(self, block, call, args, kwargs):
        """Calls a decoder block, or one that computes the same.

        Args:
            block: A layer.
            call: Function from a layer, `args` and `kwargs` to what it returns.
            args: Tuple of positional arguments.
            kwargs: Dictionary of keyword arguments.
        """
        return call(block, args, kwargs)

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


def write_with_jax(kept, update, index):
    """`Access.write()` in slices, which XLA writes in place if it may."""
    import jax

    if not is_per_row(index):
        return ops.slice_update(kept, start_at(0, 0, index, 0), update)

    def write_row(kept, update, index):
        return ops.slice_update(kept, start_at(0, index, 0), update)

    return jax.vmap(write_row)(kept, update, ops.cast(index, "int32"))


def write_with_torch(kept, update, places):
    """`Access.put()` in place, by a kernel that leaves indices on the device.

    `ops.slice_update` reads them back into Python.
    """
    places = ops.cast(places, "int64")
    if places.shape[0] == 1:
        return kept.index_copy_(2, places[0], update)
    places = places[:, None, :, None].expand(update.shape)
    return kept.scatter_(2, places, update)


def _write_differentiably(kept, update, index):
    """`ops.slice_update` in operations that TensorFlow can derive and export.

    What Keras makes of that is XLA's alone.
    """
    import tensorflow as tf

    index, length = ops.cast(index, "int32"), ops.shape(update)[2]
    if tf.executing_eagerly() and not is_per_row(index):
        before, after = kept[:, :, :index], kept[:, :, index + length :]
        return tf.concat([before, update, after], axis=2)
    # Compiled, no shape may depend on the index.
    source = slots(0, ops.shape(kept)[2]) - ops.reshape(index, (-1, 1))
    written = ops.logical_and(source >= 0, source < length)
    return _where(written, update, ops.clip(source, 0, length - 1), kept)


def _where(written, update, source, kept):
    """Takes tokens of `update` for some places, and for others what is kept.

    Args:
        written: bool `(B or 1, S)`. Which places are written.
        update: Tensor `(B, key_value_heads, T, head_dim)`.
        source: int32 `(B or 1, S)`. Which token.
        kept: Tensor `(B, key_value_heads, S, head_dim)`.
    """
    if source.shape[0] == 1:
        tokens = ops.take(update, source[0], axis=2)
    else:
        tokens = ops.take_along_axis(update, source[:, None, :, None], axis=2)
    return ops.where(written[:, None, :, None], tokens, kept)
