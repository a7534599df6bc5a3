"""Attention over a cache: project, rotate, update the cache, attend, project.

`CachedAttention.call` reads in that order. A model family subclasses it
together with upstream's attention layer and states only what differs: how it
projects, how it scales, whether it caps its logits or slides a window.
"""

from keras import ops

from keras_nlp_cache.cache import LayerCache
from keras_nlp_cache.cache import MASKED


def attend(
    query, key, value, mask, scale, soft_cap=None, dropout=None, sink=None
):
    """Scaled dot-product attention with grouped queries.

    Each key/value head serves `query_heads / key_value_heads` query heads. The
    queries are grouped by the head that serves them, so that the keys and
    values are read where they lie and never repeated.

    Args:
        query: Tensor `(B, T, query_heads, head_dim)`.
        key: Tensor `(B, key_value_heads, S, head_dim)`.
        value: Tensor `(B, key_value_heads, S, head_dim)`.
        mask: float32 tensor `(B or 1, 1, T, S)`, added to the logits.
        scale: float. Multiplies the logits.
        soft_cap: Optional float. Bounds the logits to `(-soft_cap, soft_cap)`
            by a tanh, as in Gemma 2 (https://arxiv.org/abs/2408.00118).
        dropout: Optional callable, applied to the attention weights.
        sink: Optional tensor `(query_heads,)`. One more logit for each head,
            of a key that has no value: what is attended there is attended
            nowhere else.

    Returns:
        A tensor `(B, T, query_heads, head_dim)` of the dtype of `query`. Zero
        for a query that may attend to nothing.

    Reference:
        Grouped-query attention, https://arxiv.org/abs/2305.13245
    """
    dtype = query.dtype
    batch, length, query_heads, head_dim = ops.shape(query)
    heads, max_length = ops.shape(key)[1:3]
    groups = query_heads // heads

    query = ops.reshape(query, (batch, length, heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 3, 1, 4))
    query = ops.reshape(query, (batch, heads, groups * length, head_dim))
    logits = ops.matmul(query, ops.cast(ops.swapaxes(key, 2, 3), dtype))
    logits = ops.cast(logits, "float32") * scale
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    logits = ops.reshape(logits, (batch, heads, groups, length, max_length))
    logits = logits + mask[:, :, None]
    if sink is None:
        weights = ops.softmax(logits, axis=-1)
    else:
        sink = ops.reshape(ops.cast(sink, "float32"), (heads, groups, 1, 1))
        sink = ops.broadcast_to(sink, (*ops.shape(logits)[:-1], 1))
        logits = ops.concatenate([logits, sink], axis=-1)
        weights = ops.softmax(logits, axis=-1)[..., :-1]
    weights = ops.cast(weights, dtype)
    if dropout is not None:
        weights = dropout(weights)

    weights = ops.reshape(weights, (batch, heads, groups * length, max_length))
    output = ops.matmul(weights, ops.cast(value, dtype))
    output = ops.reshape(output, (batch, heads, groups, length, head_dim))
    output = ops.transpose(output, (0, 3, 1, 2, 4))
    output = ops.reshape(output, (batch, length, query_heads, head_dim))
    sees_any = ops.max(mask, axis=-1) > MASKED / 2
    return output * ops.cast(sees_any, dtype)[:, 0, :, None, None]


def first_argument(args, kwargs):
    """The sequence, all that upstream's layers agree to take first.

    They name it `query`, `hidden_states`, `decoder_sequence` or `x`, and some
    are called by keyword.
    """
    return args[0] if args else next(iter(kwargs.values()))


class CachedAttention:
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
        merge_heads: Method that projects `(B, T, query_heads, head_dim)` to
            `(B, T, hidden_dim)`.
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
        # No default on the class: it would hide what PyTorch keeps apart.
        attention_function = getattr(self, "replaced_attention", attend)
        x = attention_function(
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
