"""Attention functions: from query, keys, values and a mask to the output.

`attend()` reads all of a cache. `attend_filled()` reads the part that is in
use, for loops that make a cache as long as the text may become: with what is
empty merely masked out, the first step would be as slow as the last.
`AttendsThroughCache` is how a layer uses them.
"""

import functools

import keras
from keras import ops

from keras_nlp_cache.cache.layer_cache import is_owned
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.layer_cache import MASKED
from keras_nlp_cache.cache.layer_cache import start_at

# Numbers per slot, in the keys of all rows and heads, up to which copying a
# block costs less than reading slots that are empty.
_NARROW = 2048


def block_size(slots, width):
    """How many slots are attended at a time.

    XLA copies a block before it multiplies it. Where a slot is narrow, blocks
    stay in the processor's cache and a small one saves the most. Where it is
    wide, copies go to memory and it takes many empty slots to pay for them.
    In a long cache, many small blocks cost more than a few large ones.

    Measured on 2 cores with SmolLM2 (a width of 192), GPT-2 (768) and GPT-2 at
    batch 8 (6144).

    Args:
        slots: int. The slots of the cache.
        width: int. The numbers that a slot holds, batch x heads x head size.
    """
    return max(128 if width <= _NARROW else 512, slots // 4)


def attend(
    query,
    key,
    value,
    mask,
    scale,
    soft_cap=None,
    dropout=None,
    sink=None,
    bias=None,
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
        bias: Optional float32 tensor `(B or 1, query_heads, T, S)`, added to
            the logits as the mask is. It hides nothing.

    Returns:
        A tensor `(B, T, query_heads, head_dim)` of the dtype of `query`. Zero
        for a query that may attend to nothing.

    Reference:
        Grouped-query attention, https://arxiv.org/abs/2305.13245
    """
    weights = attention_weights(query, key, mask, scale, soft_cap, sink, bias)
    weights = ops.cast(weights, query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    output = ungroup_queries(weighted_values(weights, value))
    return zero_unless_seen(output, mask)


def attention_weights(
    query, key, mask, scale, soft_cap=None, sink=None, bias=None
):
    """What `attend()` weighs values with, before dropout.

    Args:
        query: As for `attend()`, like all that follow.
        key: Tensor.
        mask: float32 tensor.
        scale: float.
        soft_cap: Optional float.
        sink: Optional tensor.
        bias: Optional float32 tensor.

    Returns:
        A float32 tensor `(B, key_value_heads, groups, T, S)`.
    """
    heads = ops.shape(key)[1]
    mask = mask if bias is None else mask + bias
    logits = attention_logits(
        group_queries(query, heads), key, mask, scale, soft_cap
    )
    if sink is None:
        return ops.softmax(logits, axis=-1)
    sink = group_heads(sink, heads)
    sink = ops.broadcast_to(sink, (*ops.shape(logits)[:-1], 1))
    logits = ops.concatenate([logits, sink], axis=-1)
    return ops.softmax(logits, axis=-1)[..., :-1]


def attend_filled(query, key, value, mask, filled, **kwargs):
    """Attends to the first slots of a cache, and reads no others.

    On PyTorch it reads a prefix of the cache. Elsewhere, where a compiled shape
    cannot depend on a value, it reads one block of slots after the other; as
    their number depends on a value, there is no gradient. On an accelerator
    each block would wait for the host to say whether there is another, and all
    slots are read.

    Args:
        query: Tensor `(B, T, query_heads, head_dim)`.
        key: Tensor `(B, key_value_heads, S, head_dim)`. If `S` is no multiple
            of `block_size()`, all slots are read.
        value: Tensor `(B, key_value_heads, S, head_dim)`.
        mask: float32 tensor `(B or 1, 1, T, S)`, added to the logits. Has to
            hide the slots from `filled` on.
        filled: int32 scalar, the number of slots to attend to.
        **kwargs: The other arguments of `attend()`.

    Returns:
        What `attend()` does.
    """
    if keras.config.backend() == "torch":
        from keras_nlp_cache.attention.torch_prefix import attend_prefix

        return attend_prefix(query, key, value, mask, filled, **kwargs)
    batch, heads, slots, head_dim = ops.shape(key)
    if not isinstance(batch, int) or not isinstance(slots, int):
        return attend(query, key, value, mask, **kwargs)
    if _on_an_accelerator():
        return attend(query, key, value, mask, **kwargs)
    size = block_size(slots, batch * heads * head_dim)
    if slots <= size or slots % size:
        return attend(query, key, value, mask, **kwargs)
    return _attend_in_blocks(query, key, value, mask, filled, size, **kwargs)


def _on_an_accelerator():
    if keras.config.backend() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))


def _attend_in_blocks(
    query,
    key,
    value,
    mask,
    filled,
    size,
    scale,
    soft_cap=None,
    dropout=None,
    sink=None,
    bias=None,
):
    """Attention with a running maximum and sum, block by block.

    Reference:
        https://arxiv.org/abs/1805.02867
    """
    batch, heads, _, head_dim = ops.shape(key)
    grouped = group_queries(query, heads)
    _, _, groups, length, _ = ops.shape(grouped)
    added = mask if bias is None else mask + bias

    def block(x, axis, i):
        start, shape = [0] * 4, list(ops.shape(x))
        start[axis], shape[axis] = i * size, size
        return ops.slice(x, start_at(*start), shape)

    def body(i, largest, total, output):
        logits = attention_logits(
            grouped, block(key, 2, i), block(added, 3, i), scale, soft_cap
        )
        now = ops.maximum(largest, ops.max(logits, axis=-1, keepdims=True))
        weights = ops.exp(logits - now)
        shrink = ops.exp(largest - now)
        total = total * shrink + ops.sum(weights, axis=-1, keepdims=True)
        if dropout is not None:
            weights = dropout(weights)
        update = weighted_values(
            ops.cast(weights, query.dtype), block(value, 2, i)
        )
        output = output * shrink + ops.cast(update, "float32")
        return i + 1, now, total, output

    shape = (batch, heads, groups, length)
    _, largest, total, output = ops.while_loop(
        lambda i, *_: i * size < filled,
        body,
        (
            ops.convert_to_tensor(0, "int32"),
            ops.full((*shape, 1), 8 * MASKED, dtype="float32"),
            ops.zeros((*shape, 1), dtype="float32"),
            ops.zeros((*shape, head_dim), dtype="float32"),
        ),
    )
    if sink is not None:
        sink = group_heads(sink, heads)
        # What a sink takes may be all but nothing, or all but everything.
        now = ops.maximum(largest, sink)
        shrink = ops.exp(largest - now)
        total = total * shrink + ops.exp(sink - now)
        output = output * shrink
    output = ungroup_queries(ops.cast(output / total, query.dtype))
    return zero_unless_seen(output, mask)


def group_heads(x, heads):
    """float32 `(heads, groups, 1, 1)`, of a number for each query head."""
    groups = ops.shape(x)[0] // heads
    return ops.reshape(ops.cast(x, "float32"), (heads, groups, 1, 1))


def group_queries(query, heads):
    """Puts next to each other the queries that one key/value head serves.

    Args:
        query: Tensor `(B, T, query_heads, head_dim)`.
        heads: int. The number of key/value heads.

    Returns:
        A tensor `(B, heads, groups, T, head_dim)`.
    """
    batch, length, query_heads, head_dim = ops.shape(query)
    query = ops.reshape(
        query, (batch, length, heads, query_heads // heads, head_dim)
    )
    return ops.transpose(query, (0, 2, 3, 1, 4))


def ungroup_queries(x):
    """Undoes `group_queries()`."""
    batch, heads, groups, length, head_dim = ops.shape(x)
    x = ops.transpose(x, (0, 3, 1, 2, 4))
    return ops.reshape(x, (batch, length, heads * groups, head_dim))


def attention_logits(query, key, mask, scale, soft_cap=None):
    """float32 logits `(B, heads, groups, T, S)`, from grouped queries.

    The mask is `(B or 1, 1 or query_heads, T, S)`.
    """
    batch, heads, groups, length, head_dim = ops.shape(query)
    query = ops.reshape(query, (batch, heads, groups * length, head_dim))
    # In this order, since XLA on a CPU transposes what is on the right, and the
    # keys are many.
    logits = ops.matmul(ops.cast(key, query.dtype), ops.swapaxes(query, 2, 3))
    logits = ops.cast(ops.swapaxes(logits, 2, 3), "float32") * scale
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    slots = ops.shape(key)[2]
    logits = ops.reshape(logits, (batch, heads, groups, length, slots))
    if mask.shape[1] == 1:
        return logits + mask[:, :, None]
    return logits + ops.reshape(mask, (-1, heads, groups, length, slots))


def weighted_values(weights, value):
    """Sums values: `(B, heads, groups, T, S)` of `(B, heads, S, head_dim)`."""
    batch, heads, groups, length, slots = ops.shape(weights)
    weights = ops.reshape(weights, (batch, heads, groups * length, slots))
    output = ops.matmul(weights, ops.cast(value, weights.dtype))
    return ops.reshape(
        output, (batch, heads, groups, length, ops.shape(value)[3])
    )


def zero_unless_seen(output, mask):
    """Replaces by zeros what queries attended that may attend to nothing."""
    sees_any = ops.max(mask, axis=-1) > MASKED / 2
    return output * ops.cast(sees_any, output.dtype)[:, 0, :, None, None]


class AttendsThroughCache:
    """Mixin for attention layers: project, update the cache, attend, project.

    Attributes:
        key_value_shape: `(key_value_heads, head_dim)` of the keys and of the
            values.
        project: Method `(x, positions) -> (query, key, value)`, from
            `(B, T, hidden_dim)` and int32 `(B or 1, T)`. Rotates query and key
            if the family does. The query is `(B, T, query_heads, head_dim)`,
            key and value are `(B, T, key_value_heads, head_dim)`.
        scale: float. Multiplies the attention logits.
        soft_cap: Optional float. See `attend()`.
        window: Optional int. How many positions a query sees, its own
            included.
        weights_dropout: Optional callable, applied to the attention weights.
        sink: Optional tensor `(query_heads,)`. See `attend()`.
        logits_bias: Optional method from how far behind the query each slot
            is, int32 `(B or 1, T, S)`, to the `bias` of `attend()`.
        merge_heads: Method from `(B, T, query_heads, head_dim)` to
            `(B, T, hidden_dim)`.
    """

    soft_cap = None
    window = None
    weights_dropout = None
    sink = None
    logits_bias = None

    def attend_through(self, x, cache, index=None):
        """Attends to what a cache remembers, and to the new tokens.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            cache: A `LayerCache` in use, or a bare `(key, value)` pair.
            index: int scalar, the slot of the first token. Goes with a pair.

        Returns:
            `(output, (key, value))`, with a pair of `None` if the cache has
            no memory.
        """
        length = ops.shape(x)[1]
        if not isinstance(cache, LayerCache):
            cache = LayerCache.of_pair(cache, index, length, self.window)
        query, key, value = self.project(x, cache.positions)
        remembered = cache.update(
            ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2)
        )
        # Few families have these, and few functions know them.
        further = {}
        if self.sink is not None:
            further["sink"] = self.sink
        if self.logits_bias is not None:
            further["bias"] = self.logits_bias(cache.distance)
        x = self.attention_function(cache, length)(
            query=query,
            key=remembered.key,
            value=remembered.value,
            mask=cache.mask,
            scale=self.scale,
            soft_cap=self.soft_cap,
            dropout=self.weights_dropout,
            **further,
        )
        if cache.key is None:
            return self.merge_heads(x), (None, None)
        return self.merge_heads(x), (remembered.key, remembered.value)

    def attention_function(self, cache, length):
        """`attend()`, or what a loop may use in its place."""
        if cache.key is None or not is_owned():
            return attend
        filled = ops.cast(cache.index, "int32") + length
        return functools.partial(attend_filled, filled=filled)
