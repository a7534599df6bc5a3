"""Attention to the text and to what an encoder returned, in one softmax.

A layer that attends so has two entries: of the text, which grows, and of what
the encoder returned, which is written once. They are read where they lie, and
not put in a row for each token.
"""

import functools

from keras import ops

from keras_nlp_cache.attention.functions import attention_logits
from keras_nlp_cache.attention.functions import group_queries
from keras_nlp_cache.attention.functions import ungroup_queries
from keras_nlp_cache.attention.functions import weighted_values
from keras_nlp_cache.attention.functions import zero_unless_seen
from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.int8 import turn
from keras_nlp_cache.cache.int8 import turn_back
from keras_nlp_cache.cache.int8 import widened
from keras_nlp_cache.layers import block_call


class JoinedAttention(CachedAttention):
    """Mixin for an attention layer with one softmax over both."""

    joins_source = True

    def answer(self, x, cache, kwargs):
        across = block_call.across_of(self) or self.source_at_once(**kwargs)
        output, pair, of_source = self.attend_to_both(x, cache, across)
        if block_call.across_of(self) is not None:
            block_call.current().updated_across[id(self)] = of_source
        return output, pair

    def source_at_once(self, **kwargs):
        """What `_all_at_once()` returns, of what an encoder returned.

        Args:
            **kwargs: What else the layer was called with.
        """
        raise NotImplementedError

    def attend_to_both(self, x, cache, across):
        """Attends to the text and to what an encoder returned.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            cache: A `LayerCache` in use, of the text.
            across: A `LayerCache` in use, of what the encoder returned.

        Returns:
            `(output, pair, pair)`, with what is kept now of either.
        """
        query, key, value = self.project(x, cache.positions)
        entry, key, value = cache.update(
            ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2)
        )
        of_source = across.key, across.value
        if across.key is None:
            source = [
                ops.swapaxes(y, 1, 2)
                for y in self.project_source(across.source)
            ]
        else:
            of_source = self.read_across(across)
            source = [y.stored for y in of_source]
        function = attend_jointly
        if hasattr(self, "replaced_attention"):
            key, value = widened(key, x.dtype), widened(value, x.dtype)
            source = [widened(y, x.dtype) for y in source]
            function = functools.partial(_in_a_row, self.replaced_attention)
        elif isinstance(key, Int8):
            query = turn(query)
        x = function(
            query,
            ((key, value, cache.mask), (*source, across.mask)),
            self._nearer_sinks(x, query, key, cache),
            scale=self.scale,
            soft_cap=self.soft_cap,
            dropout=self.weights_dropout,
        )
        if isinstance(value, Int8):
            x = turn_back(x)
        return self.merge_heads(x), entry, of_source


def attend_jointly(query, parts, bias, scale, soft_cap=None, dropout=None):
    """Does what `attend()` does, to two keys and values in one softmax.

    Args:
        query: Tensor `(B, T, query_heads, head_dim)`.
        parts: Two triples of key, value and mask, each as for `attend()`. A
            mask may be the same for all tokens, `(B, 1, 1, S)`.
        bias: Optional, the `bias` of `attend()`, for the first of them.
        scale: float.
        soft_cap: Optional float.
        dropout: Optional callable.

    Returns:
        A tensor `(B, T, query_heads, head_dim)` of the dtype of `query`.
    """
    (key, value, mask), (other_key, other_value, other_mask) = parts
    grouped = group_queries(query, key.shape[1])
    logits = attention_logits(
        grouped, key, mask if bias is None else mask + bias, scale, soft_cap
    )
    others = attention_logits(grouped, other_key, other_mask, scale, soft_cap)
    count = ops.shape(logits)[-1]
    weights = ops.softmax(ops.concatenate([logits, others], axis=-1), axis=-1)
    weights = ops.cast(weights, query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    output = ungroup_queries(
        weighted_values(weights[..., :count], value)
        + weighted_values(weights[..., count:], other_value)
    )
    sees = [ops.max(x, axis=3, keepdims=True) for x in (mask, other_mask)]
    return zero_unless_seen(output, ops.maximum(*sees))


def _in_a_row(function, query, parts, bias, **kwargs):
    """Calls any attention function on two keys and values.

    Args:
        function: With the arguments of `attend()`.
        query: As for `attend_jointly()`, like all that follow.
        parts: Two triples.
        bias: Optional.
        **kwargs: The others.
    """
    batch, length = ops.shape(query)[:2]
    keys, values, masks = zip(*parts)
    masks = [
        ops.broadcast_to(x, (batch, 1, length, ops.shape(x)[3])) for x in masks
    ]
    if bias is not None:
        others = ops.zeros((1, 1, 1, ops.shape(masks[1])[3]), "float32")
        others = ops.broadcast_to(
            others, (*ops.shape(bias)[:3], ops.shape(others)[3])
        )
        kwargs["bias"] = ops.concatenate([bias, others], axis=3)
    return function(
        query=query,
        key=ops.concatenate(keys, axis=2),
        value=ops.concatenate(values, axis=2),
        mask=ops.concatenate(masks, axis=3),
        **kwargs,
    )
