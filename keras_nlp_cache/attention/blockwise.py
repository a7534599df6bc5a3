"""Attention to the first slots of a cache, one block of slots after the other.

For compiled loops, whose shapes cannot depend on a value. As the number of
blocks does, there is no gradient.
"""

from keras import ops
from keras import tree

from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.attention.functions import attention_logits
from keras_nlp_cache.attention.functions import group_heads
from keras_nlp_cache.attention.functions import group_queries
from keras_nlp_cache.attention.functions import ungroup_queries
from keras_nlp_cache.attention.functions import weighted_values
from keras_nlp_cache.attention.functions import zero_unless_seen
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.device import constants


def block_size(slots, width):
    """How many slots are attended at a time.

    XLA copies a block before it multiplies it. Where a slot is narrow, blocks
    stay in the processor's cache and a small one saves the most. Where it is
    wide, copies go to memory and it takes many empty slots to pay for them.
    In a long cache, many small blocks cost more than a few large ones.

    `keras_nlp_cache.device` says where that was measured.

    Args:
        slots: int. The slots of the cache.
        width: int. The numbers that a slot holds, batch x heads x head size.
    """
    known = constants()
    block = known.small_block if width <= known.narrow else known.large_block
    return max(block, slots // known.most_blocks)


def attend_in_blocks(query, key, value, mask, filled, **kwargs):
    """Attends to the first slots of a cache, and reads few others.

    Args:
        query: Tensor `(B, T, query_heads, head_dim)`.
        key: Tensor or `Int8` `(B, key_value_heads, S, head_dim)`. If `S` is no
            multiple of `block_size()`, all slots are read.
        value: Tensor or `Int8` `(B, key_value_heads, S, head_dim)`.
        mask: float32 tensor `(B or 1, 1, T, S)`, added to the logits. Has to
            hide the slots from `filled` on.
        filled: int32 scalar, the number of slots to attend to.
        **kwargs: The other arguments of `attend()`.

    Returns:
        What `attend()` does.
    """
    batch, heads, slots, head_dim = key.shape
    if not isinstance(batch, int) or not isinstance(slots, int):
        return attend(query, key, value, mask, **kwargs)
    size = block_size(slots, batch * heads * head_dim)
    if slots <= size or slots % size:
        return attend(query, key, value, mask, **kwargs)
    return _attend_in_blocks(query, key, value, mask, filled, size, **kwargs)


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
    batch, heads, _, head_dim = key.shape
    grouped = group_queries(query, heads)
    _, _, groups, length, _ = ops.shape(grouped)
    added = mask if bias is None else mask + bias

    def block(x, axis, i):
        start, shape = [0] * 4, list(ops.shape(x))
        start[axis], shape[axis] = i * size, size
        return ops.slice(x, start_at(*start), shape)

    def tokens(x, i):
        return tree.map_structure(lambda y: block(y, 2, i), x)

    def body(i, largest, total, output):
        logits = attention_logits(
            grouped, tokens(key, i), block(added, 3, i), scale, soft_cap
        )
        now = ops.maximum(largest, ops.max(logits, axis=-1, keepdims=True))
        weights = ops.exp(logits - now)
        shrink = ops.exp(largest - now)
        total = total * shrink + ops.sum(weights, axis=-1, keepdims=True)
        if dropout is not None:
            weights = dropout(weights)
        update = weighted_values(
            ops.cast(weights, query.dtype), tokens(value, i)
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
