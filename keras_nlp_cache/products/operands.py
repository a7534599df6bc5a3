"""What a product is of: where it lies, and how it is read and written.

Inputs and results are float32 or of 16 bits, see `kernels/floats.py`. A piece
of a job is some of the outputs of all rows. Each reads the inputs for itself:
they are few numbers next to the weight's.
"""

import numba
import numpy as np
from numba import carray

from keras_nlp_cache.kernels import floats
from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.machine_words import pointer

# Arguments. `SCALE` is, of int8, what results are divided by, in the dtype of
# inputs, and of what is in groups, what groups are multiplied with.
WEIGHT, INPUTS, SCALE, ZERO = range(jobs.ARGUMENTS, jobs.ARGUMENTS + 4)
# Sizes: `N`, `K`, how many rows there are, how many numbers along `K` share a
# scale, and how many they are when packed, 0 if there are no groups. Then the
# dtype of inputs and results, and of inputs that are rounded to integers, what
# is added to the largest of a row before all are divided by it.
(
    OUTPUTS,
    DEPTH,
    ROWS,
    BLOCK,
    PACKED_BLOCK,
    DTYPE,
    EPSILON_BITS,
) = range(jobs.SIZES, jobs.SIZES + 7)

# Of which the bits of a float32 are an integer, plus those of this number: what
# is added to it is rounded, to the even one of two that are as near.
_ROUNDER = np.float32(1.5 * 2**23)
_MOST = np.float32(127)


@numba.njit
def outputs_of(q, piece):
    """Of which outputs a piece is: the first, and behind the last."""
    count, pieces = q[OUTPUTS], q[jobs.PIECES]
    return piece * count // pieces, (piece + 1) * count // pieces


@numba.njit
def inputs(q):
    """The inputs of a job, float32 `(rows, K)`, with its groups as packed."""
    rows, depth, dtype = q[ROWS], q[DEPTH], q[DTYPE]
    block, packed = q[BLOCK], q[PACKED_BLOCK]
    if dtype == 0 and block == packed and (block == 0 or depth % block == 0):
        return carray(pointer(q[INPUTS]), (rows, depth), np.float32)
    if block == 0:
        block = packed = depth
    groups = -(-depth // block)
    x = np.zeros((rows, groups * packed), np.float32)
    for i in range(rows):
        for g in range(groups):
            first = g * block
            count = min(block, depth - first)
            place = floats.address_of(q[INPUTS], dtype, i * depth + first)
            floats.read(place, dtype, x[i, g * packed : g * packed + count])
    return x


@numba.njit
def _largest(x):
    """The largest absolute value."""
    bits = x.view(np.int32)
    # Numbers without a sign are in the order of their bits, and integers are
    # compared in vectors.
    most = np.int32(0)
    for i in range(bits.size):
        most = max(most, bits[i] & np.int32(0x7FFFFFFF))
    return np.array([most], np.int32).view(np.float32)[0]


@numba.njit
def _round(x, scale, dtype, out):
    """Rounds `x * scale` to integers."""
    for i in range(x.size):
        y = floats.rounded(x[i] * scale, dtype) + _ROUNDER - _ROUNDER
        out[i] = np.int8(max(-_MOST, min(_MOST, y)))


@numba.njit
def rounded_inputs(job, q):
    """Inputs as Keras rounds them, int8 `(rows, K)`, and a scale of each row.

    See `keras.quantizers.abs_max_quantize`.
    """
    epsilon = carray(pointer(job + 8 * EPSILON_BITS), 1, np.float64)[0]
    x, dtype = inputs(q), q[DTYPE]
    numbers = np.empty(x.shape, np.int8)
    scales = np.empty(x.shape[0], np.float32)
    for i in range(x.shape[0]):
        most = floats.rounded(_largest(x[i]) + np.float32(epsilon), dtype)
        scales[i] = floats.rounded(_MOST / most, dtype)
        _round(x[i], scales[i], dtype, numbers[i])
    return numbers, scales


@numba.njit
def divide(q, y, first, scales):
    """Divides results, from the first output on, by scales of rows and outputs.

    Args:
        q: The job.
        y: float32 array `(rows, count)`, changed.
        first: int64.
        scales: float32 array `(rows,)`.
    """
    dtype, count = q[DTYPE], y.shape[1]
    scale = np.empty(count, np.float32)
    floats.read(floats.address_of(q[SCALE], dtype, first), dtype, scale)
    for i in range(y.shape[0]):
        for n in range(count):
            y[i, n] /= floats.rounded(scales[i] * scale[n], dtype)


@numba.njit
def write(q, y, first):
    """Writes results, float32 `(rows, count)`, from the first output on."""
    for i in range(y.shape[0]):
        index = i * q[OUTPUTS] + first
        place = floats.address_of(q[jobs.RESULT], q[DTYPE], index)
        floats.write(place, q[DTYPE], y[i])
