"""Attention of a decode step by a kernel of our own, where that is faster."""

import keras
from keras import ops

from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.device import constants

_DTYPES = ("float32", "bfloat16", "float16", "int8")


def attend_by_kernel(
    query,
    key,
    value,
    mask,
    filled,
    otherwise,
    scale,
    soft_cap=None,
    dropout=None,
    sink=None,
    bias=None,
):
    """Attends to the first slots of a cache, by a kernel if one serves.

    Nothing is trained through a cache that a loop owns, so there is no dropout.

    Args:
        query: As for `attend()`, like all that are not named here.
        key: Tensor or `Int8`.
        value: Tensor or `Int8`.
        mask: float32 tensor. Has to hide the slots from `filled` on.
        filled: int32 scalar, the number of slots to attend to.
        otherwise: Function with the arguments of `attend()`, for what no kernel
            serves.
        scale: float.
        soft_cap: Optional float.
        dropout: Optional callable.
        sink: Optional tensor.
        bias: Optional float32 tensor.

    Returns:
        What `attend()` does.
    """
    numbers = key.values if isinstance(key, Int8) else key
    if not _is_served(query, numbers):
        return otherwise(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=scale,
            soft_cap=soft_cap,
            dropout=dropout,
            sink=sink,
            bias=bias,
        )
    # Which takes numba to import.
    from keras_nlp_cache.attention.kernels import KERNELS
    from keras_nlp_cache.kernels.floats import number_of
    from keras_nlp_cache.kernels.kernel import bits
    from keras_nlp_cache.kernels.kernel import pieces_of
    from keras_nlp_cache.kernels.kernel import tensor_bytes

    scales = None, None
    if isinstance(key, Int8):
        scales = key.scale, value.scale
        key, value = key.values, value.values
    added = mask if bias is None else mask + bias
    rows, length, query_heads, head_dim = query.shape
    _, heads, slots, _ = key.shape
    groups = query_heads // heads
    together = groups if rows * heads >= constants().few_heads else 1
    kernel = KERNELS[keras.backend.standardize_dtype(key.dtype)]
    dtype = keras.backend.standardize_dtype(query.dtype)
    return kernel(
        [
            query,
            key,
            value,
            added,
            ops.cast(filled, "int32"),
            None if sink is None else ops.cast(sink, "float32"),
            *scales,
        ],
        shape=tuple(query.shape),
        dtype=dtype,
        sizes=(
            rows,
            heads,
            groups,
            length,
            slots,
            head_dim,
            added.shape[0],
            added.shape[1],
            together,
            bits(scale),
            bits(soft_cap or 0),
            number_of(dtype),
        ),
        pieces=pieces_of(2 * tensor_bytes(key), most=rows * query_heads),
    )


def _is_served(query, key):
    """Whether a kernel attends with a query to keys, known by their shapes."""
    shape = (*query.shape, *key.shape)
    if None in shape:
        return False
    if keras.backend.standardize_dtype(key.dtype) not in _DTYPES:
        return False
    queries = query.shape[1] * query.shape[2] // key.shape[1]
    return queries <= constants().most_queries
