"""The exponential function, for loops that are to run in vectors."""

import numba
import numpy as np

from keras_nlp_cache.kernels.machine_words import power_of_two

_LOG_2_OF_E = np.float32(1.4426950408889634)
# The logarithm of 2 in two parts, so that nothing is lost with the first.
_LOG_2 = np.float32(0.693359375)
_LOG_2_REST = np.float32(-2.12194440e-4)
_LEAST = np.float32(-87)


@numba.njit
def exp(x):
    """`exp()` of a float32 that is not above 0, in code without branches.

    That of the C library takes one number at a time. Zero below 1e-38.
    """
    y = max(x, _LEAST)
    n = np.floor(y * _LOG_2_OF_E + np.float32(0.5))
    y = y - n * _LOG_2 - n * _LOG_2_REST
    p = np.float32(1 / 720)
    p = p * y + np.float32(1 / 120)
    p = p * y + np.float32(1 / 24)
    p = p * y + np.float32(1 / 6)
    p = p * y + np.float32(1 / 2)
    p = p * y + np.float32(1)
    p = p * y + np.float32(1)
    p = p * power_of_two(np.int32(n))
    return p if x > _LEAST else np.float32(0)
