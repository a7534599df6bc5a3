"""Floats of 32 and of 16 bits, which kernels compute with in float32.

A kernel is told of which dtype a tensor is, by a number, and widens what it
reads and rounds what it writes. So nobody converts a tensor for it.
"""

import numba
import numpy as np
from numba import carray

from keras_nlp_cache.kernels.machine_words import from_bfloat16
from keras_nlp_cache.kernels.machine_words import from_float16
from keras_nlp_cache.kernels.machine_words import pointer
from keras_nlp_cache.kernels.machine_words import to_bfloat16
from keras_nlp_cache.kernels.machine_words import to_float16

DTYPES = ("float32", "bfloat16", "float16")
_FLOAT32, _BFLOAT16, _FLOAT16 = range(3)


def number_of(dtype):
    """The number that kernels know a dtype by.

    Args:
        dtype: str. One of `DTYPES`.
    """
    return DTYPES.index(dtype)


@numba.njit
def address_of(address, dtype, index):
    """Where a number of a tensor lies.

    Args:
        address: int64. Where the first one lies.
        dtype: int64. From `number_of()`.
        index: int64.
    """
    return address + index * (4 if dtype == _FLOAT32 else 2)


@numba.njit
def read(address, dtype, out):
    """Reads as many numbers as `out`, a float32 array, has."""
    count = out.size
    if dtype == _FLOAT32:
        numbers = carray(pointer(address), count, np.float32)
        for i in range(count):
            out[i] = numbers[i]
        return
    bits = carray(pointer(address), count, np.uint16)
    if dtype == _BFLOAT16:
        for i in range(count):
            out[i] = from_bfloat16(bits[i])
    else:
        for i in range(count):
            out[i] = from_float16(bits[i])


@numba.njit
def write(address, dtype, numbers):
    """Writes the numbers of a float32 array, rounded."""
    count = numbers.size
    if dtype == _FLOAT32:
        out = carray(pointer(address), count, np.float32)
        for i in range(count):
            out[i] = numbers[i]
        return
    bits = carray(pointer(address), count, np.uint16)
    if dtype == _BFLOAT16:
        for i in range(count):
            bits[i] = to_bfloat16(numbers[i])
    else:
        for i in range(count):
            bits[i] = to_float16(numbers[i])


@numba.njit
def rounded(x, dtype):
    """A float32, rounded to a dtype."""
    if dtype == _BFLOAT16:
        return from_bfloat16(to_bfloat16(x))
    if dtype == _FLOAT16:
        return from_float16(to_float16(x))
    return x
