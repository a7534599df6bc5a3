"""Attention over a cache: project, rotate, update the cache, attend, project.

`CachedAttention.call` reads in that order. A model family subclasses it
together with upstream's attention layer and states only what differs: how it
projects, how it scales, whether it caps its logits or slides a window.
"""

import functools
import string

import keras
from keras import ops

from keras_nlp_cache.attend import attend
from keras_nlp_cache.attend import attend_filled
from keras_nlp_cache.cache import is_owned
from keras_nlp_cache.cache import LayerCache
from keras_nlp_cache.sharing import share
from keras_nlp_cache.wiring import first_argument


def in_order_of_kernel(equation):
    """The same einsum of a dense layer, its axes named as the kernel has them.

    JAX contracts axes in the order of their names. Where the kernel has them in
    another, XLA transposes it, at every decode step.

    Args:
        equation: str, such as `"bquh,uhm->bqm"`.

    Returns:
        str, such as `"deab,abc->dec"`.
    """
    inputs, kernel, _ = equation.replace("->", ",").split(",")
    names = dict.fromkeys(kernel + inputs)
    return equation.translate(
        str.maketrans(dict(zip(names, string.ascii_lowercase)))
    )


class Rematerializable:
    """Mixin for layers that a `keras.RematScope` computes again.

    What is computed again takes and returns nothing but tensors: JAX would
    trace `training`, and TensorFlow cannot return the `(None, None)` that
    stands for no cache.

    Attributes:
        cache_argument: Name of the `call()` argument that takes the cache.
    """

    cache_argument = "cache"

    def rematerialized_call(self, layer_call, *args, **kwargs):
        fixed = {k: v for k, v in kwargs.items() if isinstance(v, bool)}
        cache = kwargs.get(self.cache_argument)
        has_pair = isinstance(cache, LayerCache) and cache.key is None

        def on_tensors(*args, **kwargs):
            output = layer_call(*args, **kwargs, **fixed)
            return output[0] if has_pair else output

        call = super().rematerialized_call(on_tensors, *args, **kwargs)

        def rematerialized(*args, **kwargs):
            kwargs = {k: v for k, v in kwargs.items() if k not in fixed}
            output = call(*args, **kwargs)
            return (output, (None, None)) if has_pair else output

        return rematerialized


class CachedAttention(Rematerializable):
    """Mixin that gives an upstream attention layer a per-layer cache.

    Placed before the upstream class in the bases of a layer of the same name,
    which says how its family attends.

    Attributes:
        key_value_shape: `(key_value_heads, head_dim)` of the keys and of the
            values.
        project: Method `(x, positions) -> (query, key, value)`, from
            `(B, T, hidden_dim)` and int32 `(B or 1, T)`. Rotates query and key
            if the family does. The query is `(B, T, query_heads, head_dim)`,
            key and value are `(B, T, key_value_heads, head_dim)`.
        scale: float. Multiplies the attention logits.
        soft_cap: Optional float. See `attend()`.
        window: Optional int. How many slots a query sees, its own included.
        weights_dropout: Optional callable, applied to the attention weights.
        projections: Names of the attributes that hold the layers which project
            to query, key and value, and from all heads to the output.
        replaced_attention: Layer that is called in place of `attend()`, with
            its arguments by name. Only there if surgery put it there.
    """

    soft_cap = None
    window = None
    weights_dropout = None
    projections = {
        "query": "_query_dense",
        "key": "_key_dense",
        "value": "_value_dense",
        "output": "_output_dense",
    }

    def compute_query_shape(self, input_shape):
        """`(B, T, query_heads, head_dim)`, from the shape of what comes in."""
        query = getattr(self, self.projections["query"])
        return tuple(query.compute_output_shape(input_shape))

    def merge_heads(self, x):
        """Projects `(B, T, query_heads, head_dim)` to `(B, T, hidden_dim)`."""
        dense = getattr(self, self.projections["output"])
        # Surgery may have put another layer there. Everywhere but in a loop,
        # sums are in upstream's order.
        if is_owned() and type(dense) is keras.layers.EinsumDense:
            if keras.config.backend() == "jax":
                dense = share(
                    dense, equation=in_order_of_kernel(dense.equation)
                )
        return dense(x)

    def call(self, *args, cache=None, **kwargs):
        """Attends as upstream does, or through a cache.

        Returns:
            As upstream does, unless `cache` is a `LayerCache` or a
            `(key, value)` pair. Then `(output, (key, value))`, where the pair
            holds the updated cache, or `None` twice if there was none.
        """
        x = first_argument(args, kwargs)
        length = ops.shape(x)[1]
        edited = hasattr(self, "replaced_attention")
        if not isinstance(cache, tuple):
            if not edited:
                return super().call(*args, cache=cache, **kwargs)
            if cache is not None:
                raise ValueError(
                    f"Expected the cache of {self.name!r}, whose attention "
                    "function was replaced, to be a (key, value) pair. "
                    f"Received: {type(cache).__name__}."
                )
            cache = LayerCache.without_memory(kwargs["attention_mask"], length)
            return self._attend(x, cache)[0]
        index = kwargs.pop("cache_update_index", None)
        if not isinstance(cache, LayerCache):
            cache = LayerCache.of_pair(cache, index, length)
        if not cache.in_use:
            if not edited:
                return super().call(*args, **kwargs), (None, None)
            cache = LayerCache.without_memory(kwargs["attention_mask"], length)
        return self._attend(x, cache)

    def _attend(self, x, cache):
        query, key, value = self.project(x, cache.positions)
        remembered = cache.update(
            ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2)
        )
        x = self._attention_function(cache, ops.shape(x)[1])(
            query=query,
            key=remembered.key,
            value=remembered.value,
            mask=cache.windowed_mask(self.window),
            scale=self.scale,
            soft_cap=self.soft_cap,
            dropout=self.weights_dropout,
        )
        if cache.key is None:
            return self.merge_heads(x), (None, None)
        return self.merge_heads(x), (remembered.key, remembered.value)

    def _attention_function(self, cache, length):
        if hasattr(self, "replaced_attention"):
            return self.replaced_attention
        if cache.key is None or not is_owned():
            return attend
        filled = ops.cast(cache.index, "int32") + length
        return functools.partial(attend_filled, filled=filled)
