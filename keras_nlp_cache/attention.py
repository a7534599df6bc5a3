"""Attention over a cache: project, rotate, update the cache, attend, project.

`CachedAttention.call` reads in that order. A model family subclasses it
together with upstream's attention layer and states only what differs: how it
projects, how it scales, whether it caps its logits or slides a window.
"""

import string

import keras
from keras import ops

from keras_nlp_cache.attend import AttendsThroughCache
from keras_nlp_cache.block_call import takes_part
from keras_nlp_cache.cache import is_owned
from keras_nlp_cache.cache import LayerCache
from keras_nlp_cache.cached_block import first_argument
from keras_nlp_cache.sharing import share


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
        if takes_part(self):
            return layer_call
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


class CachedAttention(Rematerializable, AttendsThroughCache):
    """Mixin that gives an upstream attention layer a per-layer cache.

    Placed before the upstream class in the bases of a layer of the same name,
    which says how its family attends.

    Attributes, beside those of `AttendsThroughCache`:
        projections: Names of the attributes that hold the layers which project
            to query, key and value, and from all heads to the output.
        replaced_attention: Layer that is called in place of `attend()`, with
            its arguments by name. Only there if surgery put it there.
        stand_in: Layer that is called on `x` in place of all that comes before
            the output projection. The cache stays as it is. Only there if
            surgery put it there.
    """

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
        if hasattr(self, "stand_in"):
            output = self.merge_heads(self.stand_in(x))
            return output if cache is None else (output, tuple(cache[:2]))
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
            return self._attend_to_all(x, kwargs["attention_mask"])[0]
        index = kwargs.pop("cache_update_index", None)
        if not isinstance(cache, LayerCache) or cache.in_use:
            return self.attend_through(x, cache, index)
        if not edited:
            return super().call(*args, **kwargs), (None, None)
        return self._attend_to_all(x, kwargs["attention_mask"])

    def _attend_to_all(self, x, attention_mask):
        length = ops.shape(x)[1]
        return self.attend_through(
            x, LayerCache.without_memory(attention_mask, length, self.window)
        )

    def attention_function(self, cache, length):
        if hasattr(self, "replaced_attention"):
            return self.replaced_attention
        return super().attention_function(cache, length)
