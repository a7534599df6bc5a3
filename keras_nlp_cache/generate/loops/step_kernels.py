"""Kernels for what a decode step does to a few thousand numbers.

XLA makes one loop of such operators. PyTorch calls them one by one, and each
call takes longer than what it computes.
"""

import numba
import numpy as np
from numba import carray

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.kernel import Kernel
from keras_nlp_cache.kernels.machine_words import pointer
from keras_nlp_cache.kernels.machine_words import words

X, COS, SIN = range(jobs.ARGUMENTS, jobs.ARGUMENTS + 3)
ROWS, WIDTH = jobs.SIZES, jobs.SIZES + 1
# Of `NORMALIZE`.
EPSILON_BITS = jobs.SIZES + 2
# Of `ROTATE`.
HEADS, ANGLES = jobs.SIZES + 2, jobs.SIZES + 3


@numba.njit
def _matrix(address, rows, width):
    return carray(pointer(address), (rows, width), np.float32)


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


@numba.njit(fastmath=True)
def _rotate(x, cos, sin, y, heads):
    half = x.shape[1] // 2
    for row in range(x.shape[0]):
        at = row // heads if cos.shape[0] > 1 else 0
        v, out, c, s = x[row], y[row], cos[at], sin[at]
        for i in range(half):
            out[i] = v[i] * c[i] - v[half + i] * s[i]
        for i in range(half, 2 * half):
            out[i] = v[i] * c[i] + v[i - half] * s[i]


def _normalize_piece(job, piece):
    q = words(job, jobs.WORDS)
    epsilon = carray(pointer(job + 8 * EPSILON_BITS), 1, np.float64)[0]
    _normalize(
        _matrix(q[X], q[ROWS], q[WIDTH]),
        _matrix(q[jobs.RESULT], q[ROWS], q[WIDTH]),
        np.float32(epsilon),
    )


def _rotate_piece(job, piece):
    q = words(job, jobs.WORDS)
    _rotate(
        _matrix(q[X], q[ROWS], q[WIDTH]),
        _matrix(q[COS], q[ANGLES], q[WIDTH]),
        _matrix(q[SIN], q[ANGLES], q[WIDTH]),
        _matrix(q[jobs.RESULT], q[ROWS], q[WIDTH]),
        q[HEADS],
    )


# Divides `(rows, width)` by the root of the mean of their squares.
NORMALIZE = Kernel(16, "float32", _normalize_piece)
# Rotates `(rows, width)`, heads of a token one after the other, by the cosines
# and sines of each token, or the same of all.
ROTATE = Kernel(17, "float32", _rotate_piece)
