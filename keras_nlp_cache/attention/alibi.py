"""Attention with linear biases: how far back a key is, times a slope.

Reference:
    https://arxiv.org/abs/2108.12409
"""

import functools

from keras import ops
from keras_hub.layers import AlibiBias


def alibi_bias(attention, distance):
    """The `bias` of `attend()`, for attention layers with `num_heads`.

    It is that of upstream less what is the same for all keys of a query, which
    a softmax does not see.

    Args:
        attention: The attention layer.
        distance: int32 tensor `(B or 1, T, S)`. How many positions each slot
            is behind each query.

    Returns:
        A float32 tensor `(B or 1, num_heads, T, S)`.
    """
    slopes = ops.convert_to_tensor(_slopes(attention.num_heads), "float32")
    distance = ops.cast(distance, "float32")[:, None]
    return -slopes[:, None, None] * distance


@functools.cache
def _slopes(num_heads):
    return AlibiBias()._get_slopes(num_heads)
