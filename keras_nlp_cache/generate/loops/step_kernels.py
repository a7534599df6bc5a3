"""Kernels for what a decode step does to a few thousand numbers.

XLA makes one loop of such operators. PyTorch calls them one by one, and each
call takes longer than what it computes.
"""

import numba
import numpy as np
from numba import carray

from keras_nlp_cache.kernels import floats
from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.exponential import exp
from keras_nlp_cache.kernels.kernel import Kernel
from keras_nlp_cache.kernels.machine_words import pointer
from keras_nlp_cache.kernels.machine_words import words

X = jobs.ARGUMENTS
# Of `NORMALIZE`, or 0.
WEIGHT = jobs.ARGUMENTS + 1
# Of `ROTATE`.
COS, SIN = jobs.ARGUMENTS + 1, jobs.ARGUMENTS + 2
# Of `GATE` and of `ADD`.
OTHER = jobs.ARGUMENTS + 1
# Of `PUT`, an int64.
PLACE = jobs.ARGUMENTS + 1

# How many rows of how many numbers, and their dtype.
ROWS, WIDTH, DTYPE = jobs.SIZES, jobs.SIZES + 1, jobs.SIZES + 2
# Of `NORMALIZE`: what is added, and of which dtype the weight and results are.
EPSILON_BITS, WEIGHT_DTYPE, RESULT_DTYPE = range(jobs.SIZES + 3, jobs.SIZES + 6)
# Of `ROTATE`.
HEADS, ANGLES = jobs.SIZES + 3, jobs.SIZES + 4
# Of `ADD`: how many rows the other has, as many or one.
OTHER_ROWS = jobs.SIZES + 3
# Of `PUT`: how many rows there are places for.
PLACES = jobs.SIZES + 3


@numba.njit
def _matrix(address, dtype, rows, width):
    """A float32 matrix, the memory itself if it is one."""
    if dtype == 0:
        return carray(pointer(address), (rows, width), np.float32)
    x = np.empty((rows, width), np.float32)
    floats.read(address, dtype, x.reshape(rows * width))
    return x


@numba.njit(fastmath=True)
def _normalize(x, y, epsilon):
    for row in range(x.shape[0]):
        v, out = x[row], y[row]
        total = np.float32(0)
        for i in range(v.size):
            total += v[i] * v[i]
        mean = total / np.float32(v.size)
        scale = np.float32(1) / np.sqrt(mean + epsilon)
        for i in range(v.size):
            out[i] = v[i] * scale


@numba.njit
def _multiply(y, weight):
    for row in range(y.shape[0]):
        for i in range(y.shape[1]):
            y[row, i] *= weight[i]


@numba.njit
def _rotate(x, cos, sin, y, heads, dtype):
    # Each result is rounded, as those of separate operators are.
    half = x.shape[1] // 2
    for row in range(x.shape[0]):
        at = row // heads if cos.shape[0] > 1 else 0
        v, out, c, s = x[row], y[row], cos[at], sin[at]
        for i in range(half):
            first = floats.rounded(v[i] * c[i], dtype)
            out[i] = first - floats.rounded(v[half + i] * s[i], dtype)
        for i in range(half, 2 * half):
            first = floats.rounded(v[i] * c[i], dtype)
            out[i] = first + floats.rounded(v[i - half] * s[i], dtype)


@numba.njit(fastmath=True)
def _gate(x, gated, y, dtype):
    for i in range(x.size):
        # The exponential is that of a number not above 0.
        e = exp(-abs(x[i]))
        sigmoid = (np.float32(1) if x[i] > 0 else e) / (np.float32(1) + e)
        y[i] = floats.rounded(x[i] * sigmoid, dtype) * gated[i]


def _normalize_piece(job, piece):
    q = words(job, jobs.WORDS)
    rows, width = q[ROWS], q[WIDTH]
    epsilon = carray(pointer(job + 8 * EPSILON_BITS), 1, np.float64)[0]
    x = _matrix(q[X], q[DTYPE], rows, width)
    y = np.empty((rows, width), np.float32)
    _normalize(x, y, np.float32(epsilon))
    if q[WEIGHT] != 0:
        _multiply(y, _matrix(q[WEIGHT], q[WEIGHT_DTYPE], 1, width)[0])
    floats.write(q[jobs.RESULT], q[RESULT_DTYPE], y.reshape(rows * width))


def _rotate_piece(job, piece):
    q = words(job, jobs.WORDS)
    rows, width, dtype = q[ROWS], q[WIDTH], q[DTYPE]
    y = np.empty((rows, width), np.float32)
    _rotate(
        _matrix(q[X], dtype, rows, width),
        _matrix(q[COS], dtype, q[ANGLES], width),
        _matrix(q[SIN], dtype, q[ANGLES], width),
        y,
        q[HEADS],
        dtype,
    )
    floats.write(q[jobs.RESULT], dtype, y.reshape(rows * width))


def _gate_piece(job, piece):
    q = words(job, jobs.WORDS)
    rows, width, dtype = q[ROWS], q[WIDTH], q[DTYPE]
    y = np.empty(rows * width, np.float32)
    x = _matrix(q[X], dtype, rows, width).reshape(rows * width)
    gated = _matrix(q[OTHER], dtype, rows, width).reshape(rows * width)
    _gate(x, gated, y, dtype)
    floats.write(q[jobs.RESULT], dtype, y)


def _add_piece(job, piece):
    q = words(job, jobs.WORDS)
    rows, width, dtype = q[ROWS], q[WIDTH], q[DTYPE]
    x = _matrix(q[X], dtype, rows, width)
    other = _matrix(q[OTHER], dtype, q[OTHER_ROWS], width)
    y = np.empty((rows, width), np.float32)
    for row in range(rows):
        at = row if q[OTHER_ROWS] > 1 else 0
        for i in range(width):
            y[row, i] = x[row, i] + other[at, i]
    floats.write(q[jobs.RESULT], dtype, y.reshape(rows * width))


def _put_piece(job, piece):
    q = words(job, jobs.WORDS)
    rows, width = q[ROWS], q[WIDTH]
    place = words(q[PLACE], 1)[0]
    if place < 0 or place >= q[PLACES]:
        return  # Nobody's memory.
    shape = rows, q[PLACES], width
    x = carray(pointer(q[X]), (rows, width), np.uint8)
    y = carray(pointer(q[jobs.RESULT]), shape, np.uint8)
    for row in range(rows):
        y[row, place] = x[row]


# Divides `(rows, width)` by the root of the mean of their squares.
NORMALIZE = Kernel(16, _normalize_piece)
# Rotates `(rows, width)`, heads of a token one after the other, by the cosines
# and sines of each token, or the same of all.
ROTATE = Kernel(17, _rotate_piece)
# `silu(x) * gated`.
GATE = Kernel(18, _gate_piece)
# The sum of two `(rows, width)`, or of one and the same row for each.
ADD = Kernel(19, _add_piece)
# Writes bytes, `(rows, width)`, to one place of `(rows, places, width)`.
PUT = Kernel(20, _put_piece)
