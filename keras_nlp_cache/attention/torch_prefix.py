"""Attention to a prefix of a cache, as one operator of PyTorch.

How long the prefix is, is a value, and what is captured of a decode step knows
no values. So the operator is captured as a whole, and looks when it runs.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.masks import MASKED

_LIBRARY = torch.library.Library("keras_nlp_cache", "DEF")
_LIBRARY.define(
    "attend_prefix(Tensor query, Tensor key, Tensor value, Tensor mask, "
    "Tensor filled, float scale, float? soft_cap, Tensor? sink, "
    "Tensor? key_scale, Tensor? value_scale) -> Tensor"
)


def attend_prefix(
    query,
    key,
    value,
    mask,
    filled,
    scale,
    soft_cap=None,
    dropout=None,
    sink=None,
    bias=None,
):
    """Attends to the first `filled` slots, as `attend()` does to all.

    Nothing is trained through a cache that a loop owns, so there is no
    dropout.
    """
    # Out here, what is the same in every layer is computed once per step. A
    # softmax over infinities would not be a number.
    added = mask if bias is None else mask + bias
    if soft_cap is None and sink is None:
        lowest = torch.finfo(query.dtype).min / 2
        added = added.clamp(min=lowest).to(query.dtype)
    sees_any = mask.amax(dim=-1)[:, 0, :, None, None] > MASKED / 2
    scales = None, None
    if isinstance(key, Int8):
        scales = key.scale, value.scale
        key, value = key.values, value.values
    output = torch.ops.keras_nlp_cache.attend_prefix(
        query, key, value, added, filled, scale, soft_cap, sink, *scales
    )
    return output * sees_any.to(query.dtype)


def _attend_prefix(
    query,
    key,
    value,
    mask,
    filled,
    scale,
    soft_cap,
    sink,
    key_scale,
    value_scale,
):
    if filled.is_cpu:
        # On another device, to look would be to wait for it.
        filled = int(filled)
        key, value = key[:, :, :filled], value[:, :, :filled]
        mask = mask[..., :filled]
        if key_scale is not None:
            key_scale = key_scale[:, :, :filled]
            value_scale = value_scale[:, :, :filled]
    shape, dtype, heads = query.shape, query.dtype, key.shape[1]
    groups, length = query.shape[2] // heads, query.shape[1]
    if length == 1:
        query = query.view(-1, heads, groups, query.shape[3])
    else:
        query = query.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4)
        query = query.flatten(2, 3)
    key, value = key.to(dtype), value.to(dtype)
    if mask.shape[1] > 1:  # One for each query head.
        bias = mask.unflatten(1, (heads, groups)).flatten(2, 3)
    else:
        bias = mask if length == 1 else mask.repeat(1, 1, groups, 1)
    if soft_cap is None and sink is None and key_scale is None:
        x = scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scale
        )
    else:
        logits = torch.matmul(query, key.transpose(2, 3)).float() * scale
        if key_scale is not None:
            logits = logits * key_scale.transpose(2, 3)
        if soft_cap is not None:
            logits = torch.tanh(logits / soft_cap) * soft_cap
        logits = logits + bias
        if sink is not None:
            column = sink.float().view(heads, groups, 1)
            column = column.expand(-1, -1, length).reshape(heads, -1, 1)
            column = column.expand(logits.shape[0], -1, -1, -1)
            logits = torch.cat((logits, column), dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]]
        if value_scale is not None:
            weights = weights * value_scale.transpose(2, 3)
        x = torch.matmul(weights.to(dtype), value)
    if length == 1:
        return x.reshape(shape)
    x = x.unflatten(2, (groups, length))
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


_LIBRARY.impl("attend_prefix", _attend_prefix, "CompositeExplicitAutograd")


@torch.library.register_fake("keras_nlp_cache::attend_prefix", lib=_LIBRARY)
def _(query, *_):
    return torch.empty_like(query)
