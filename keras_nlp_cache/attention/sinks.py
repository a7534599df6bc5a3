"""First tokens that seem to be nearer than they are, see `SinksAndWindow`."""

from keras import ops
from keras import tree

from keras_nlp_cache.attention.functions import attention_logits
from keras_nlp_cache.attention.functions import group_queries
from keras_nlp_cache.cache import kept as kept_tokens
from keras_nlp_cache.cache.slots import slots


def nearer_sinks(query, moved, key, kept, slot, scale, soft_cap=None):
    """What to add to the logits of the first tokens, for them to seem nearer.

    Keys stay as they were rotated. To a query that is rotated as if it stood
    so much earlier, they are as near as they should be.

    Args:
        query: Tensor `(B, T, query_heads, head_dim)`.
        moved: A tensor like it, of the queries as if they stood earlier.
        key: Tensor or `Int8` `(B, key_value_heads, S, head_dim)`, what
            attention reads.
        kept: The `SinksAndRing` that it was read from.
        slot: int32 `(B or 1, T)`. The slots of the queries.
        scale: float, as for `attend()`.
        soft_cap: Optional float, as for `attend()`.

    Returns:
        float32 tensor `(B, query_heads, T, S)`.
    """
    batch, length, query_heads, _ = ops.shape(query)
    count, total = kept.count, kept_tokens.places(key)
    # Where first tokens may be read: in their places, and among those of the
    # call, which are read behind all places if they are several.
    starts = [0] if length == 1 else [0, total - length]
    parts, end = [], 0
    zeros = ops.zeros((batch, query_heads, length, 1), "float32")
    for start in starts:
        size = min(count, total - start)
        some = tree.map_structure(
            lambda x, start=start, size=size: x[:, :, start : start + size], key
        )
        difference = _logits(moved, some, scale, soft_cap) - _logits(
            query, some, scale, soft_cap
        )
        if start:
            # Others than the first tokens are where they are.
            is_first = (slot[:, :1] + slots(0, size)) < count
            difference = ops.where(is_first[:, None, None], difference, 0.0)
        parts += [ops.repeat(zeros, start - end, axis=3), difference]
        end = start + size
    parts.append(ops.repeat(zeros, total - end, axis=3))
    return ops.concatenate(parts, axis=3)


def _logits(query, key, scale, soft_cap):
    """float32 logits `(B, query_heads, T, S)`, with nothing hidden."""
    batch, length, query_heads, _ = ops.shape(query)
    heads, count = key.shape[1], kept_tokens.places(key)
    mask = ops.zeros((1, 1, length, count), "float32")
    logits = attention_logits(
        group_queries(query, heads), key, mask, scale, soft_cap
    )
    return ops.reshape(logits, (batch, query_heads, length, count))
