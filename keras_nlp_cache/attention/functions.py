"""Attention: from query, keys, values and a mask to the output.

`attend()` reads all of a cache. Loops that make a cache as long as the text may
become read the part that is in use, or the first step would be as slow as the
last: `blockwise.py` where a compiled shape cannot depend on a value, and
`torch_prefix.py`.
"""

from keras import ops

from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.masks import MASKED


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
        key: Tensor or `Int8` `(B, key_value_heads, S, head_dim)`.
        value: Tensor or `Int8` `(B, key_value_heads, S, head_dim)`.
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
    heads = key.shape[1]
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
    key, key_scale = _numbers_and_scale(key)
    logits = ops.matmul(ops.cast(key, query.dtype), ops.swapaxes(query, 2, 3))
    logits = ops.cast(ops.swapaxes(logits, 2, 3), "float32") * scale
    if key_scale is not None:
        # Less work than to multiply the keys by it.
        logits = logits * ops.swapaxes(key_scale, 2, 3)
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
    if isinstance(length, int) and length == 1:
        # The optimizer of ONNX files drops a reshape here, and has each group
        # weigh the values of another where there are as many of all.
        weights = weights[:, :, :, 0]
    else:
        weights = ops.reshape(weights, (batch, heads, groups * length, slots))
    value, value_scale = _numbers_and_scale(value)
    if value_scale is not None:
        value_scale = ops.cast(value_scale, weights.dtype)
        weights = weights * ops.swapaxes(value_scale, 2, 3)
    output = ops.matmul(weights, ops.cast(value, weights.dtype))
    return ops.reshape(
        output, (batch, heads, groups, length, ops.shape(value)[3])
    )


def _numbers_and_scale(x):
    """Keys or values, and what their numbers are to be multiplied by."""
    return (x.values, x.scale) if isinstance(x, Int8) else (x, None)


def zero_unless_seen(output, mask):
    """Replaces by zeros what queries attended that may attend to nothing."""
    sees_any = ops.max(mask, axis=-1) > MASKED / 2
    return output * ops.cast(sees_any, output.dtype)[:, 0, :, None, None]
