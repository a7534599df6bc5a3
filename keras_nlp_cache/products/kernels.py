"""Products of a few rows with a weight, one kernel for each kind of weight.

A weight is `(N, K)`, a row of it for each output, so that what is summed over
lies side by side: read as Keras keeps it, `(K, N)`, it takes 2 to 5 times as
long. Of several rows of `x`, four meet two rows of the weight at a time, so
that what is read and widened once is used several times.

A kernel computes one piece of a job, some of the `N` outputs for all rows of
`x`; `jobs.py` says who computes which. Sums are made in whatever order is
fastest on the processor. The order does not depend on the number of threads.
"""

import numba
import numpy as np
from numba import carray

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.kernel import Kernel
from keras_nlp_cache.kernels.machine_words import from_bfloat16
from keras_nlp_cache.kernels.machine_words import from_float16
from keras_nlp_cache.kernels.machine_words import pointer
from keras_nlp_cache.kernels.machine_words import words

# What a job consists of: arguments, and sizes `N`, `K`, how many rows there
# are, and how many numbers along `K` share a scale.
WEIGHT, INPUTS, SCALE, ZERO = range(jobs.ARGUMENTS, jobs.ARGUMENTS + 4)
OUTPUTS, DEPTH, ROWS, BLOCK = range(jobs.SIZES, jobs.SIZES + 4)


@numba.njit
def _float32(x):
    return np.float32(x)


@numba.njit
def _int32(x):
    return np.int32(x)


def _sums(name, wide, wide_x, zero):
    """Code for products: what to widen numbers with, and the zero of sums.

    Each has a name of its own. Code that is loaded from disk finds what it
    calls by name, and would take that of another kind for its own.
    """

    def product(w, x, y, first, last):
        depth, rows = w.shape[1], x.shape[0]
        fours = rows // 4 * 4
        pairs = first + (last - first) // 2 * 2
        # Eight sums at a time are enough to keep a core busy.
        for n in range(first, pairs, 2) if fours else range(0):
            v, w2 = w[n], w[n + 1]
            for i in range(0, fours, 4):
                p, q, r, s = x[i], x[i + 1], x[i + 2], x[i + 3]
                a, b, c, d = zero, zero, zero, zero
                e, f, g, h = zero, zero, zero, zero
                for k in range(depth):
                    t, u = wide(v[k]), wide(w2[k])
                    xp, xq = wide_x(p[k]), wide_x(q[k])
                    xr, xs = wide_x(r[k]), wide_x(s[k])
                    a += t * xp
                    b += t * xq
                    c += t * xr
                    d += t * xs
                    e += u * xp
                    f += u * xq
                    g += u * xr
                    h += u * xs
                y[i, n], y[i, n + 1] = a, e
                y[i + 1, n], y[i + 1, n + 1] = b, f
                y[i + 2, n], y[i + 2, n + 1] = c, g
                y[i + 3, n], y[i + 3, n + 1] = d, h
        for n in range(first, last):
            v = w[n]
            for i in range(0 if n >= pairs else fours, rows):
                p = x[i]
                a = zero
                for k in range(depth):
                    a += wide(v[k]) * wide_x(p[k])
                y[i, n] = a

    product.__name__ = product.__qualname__ = name
    return numba.njit(fastmath=True)(product)


_of_floats = _sums("products_of_floats", _float32, _float32, np.float32(0))
_of_bfloat16s = _sums(
    "products_of_bfloat16s", from_bfloat16, _float32, np.float32(0)
)
_of_float16s = _sums(
    "products_of_float16s", from_float16, _float32, np.float32(0)
)
_of_integers = _sums("products_of_integers", _int32, _int32, np.int32(0))


@numba.njit
def _operands(job, piece, dtype, x_dtype, y_dtype):
    """`w`, `x` and `y` of a job, and of which outputs a piece is."""
    q = words(job, jobs.WORDS)
    n, k, rows = q[OUTPUTS], q[DEPTH], q[ROWS]
    return (
        carray(pointer(q[WEIGHT]), (n, k), dtype),
        carray(pointer(q[INPUTS]), (rows, k), x_dtype),
        carray(pointer(q[jobs.RESULT]), (rows, n), y_dtype),
        piece * n // q[jobs.PIECES],
        (piece + 1) * n // q[jobs.PIECES],
    )


def _float32_piece(job, piece):
    w, x, y, first, last = _operands(
        job, piece, np.float32, np.float32, np.float32
    )
    _of_floats(w, x, y, first, last)


def _bfloat16_piece(job, piece):
    w, x, y, first, last = _operands(
        job, piece, np.uint16, np.float32, np.float32
    )
    _of_bfloat16s(w, x, y, first, last)


def _float16_piece(job, piece):
    w, x, y, first, last = _operands(
        job, piece, np.uint16, np.float32, np.float32
    )
    _of_float16s(w, x, y, first, last)


def _int8_piece(job, piece):
    w, x, y, first, last = _operands(
        job, piece, np.int8, np.float32, np.float32
    )
    _of_floats(w, x, y, first, last)


def _int8_with_int8_piece(job, piece):
    w, x, y, first, last = _operands(job, piece, np.int8, np.int8, np.int32)
    _of_integers(w, x, y, first, last)


@numba.njit(fastmath=True)
def _of_nibbles(w, scale, zero, x, totals, y, first, last, groups, half):
    """Sums group by group: `scale * (sum(nibbles * x) - zero * sum(x))`.

    A byte holds a number of the first half of its group, and in its upper bits
    one of the second. So each half meets numbers of `x` that lie side by side.
    """
    rows = x.shape[0]
    fours = rows // 4 * 4
    for n in range(first, last):
        for i in range(0, fours, 4):
            a, b, c, d = (
                np.float32(0),
                np.float32(0),
                np.float32(0),
                np.float32(0),
            )
            for g in range(groups):
                at, low, high = g * half, 2 * g * half, (2 * g + 1) * half
                p = -zero[n, g] * totals[i, g]
                q = -zero[n, g] * totals[i + 1, g]
                r = -zero[n, g] * totals[i + 2, g]
                s = -zero[n, g] * totals[i + 3, g]
                for k in range(half):
                    v = w[n, at + k]
                    u, v = np.float32(v & 15), np.float32(v >> 4)
                    p += u * x[i, low + k] + v * x[i, high + k]
                    q += u * x[i + 1, low + k] + v * x[i + 1, high + k]
                    r += u * x[i + 2, low + k] + v * x[i + 2, high + k]
                    s += u * x[i + 3, low + k] + v * x[i + 3, high + k]
                a += scale[n, g] * p
                b += scale[n, g] * q
                c += scale[n, g] * r
                d += scale[n, g] * s
            y[i, n] = a
            y[i + 1, n] = b
            y[i + 2, n] = c
            y[i + 3, n] = d
        for i in range(fours, rows):
            a = np.float32(0)
            for g in range(groups):
                at, low, high = g * half, 2 * g * half, (2 * g + 1) * half
                p = -zero[n, g] * totals[i, g]
                for k in range(half):
                    v = w[n, at + k]
                    p += np.float32(v & 15) * x[i, low + k]
                    p += np.float32(v >> 4) * x[i, high + k]
                a += scale[n, g] * p
            y[i, n] = a


@numba.njit(fastmath=True)
def _of_bytes_in_groups(w, scale, x, y, first, last, block):
    """Sums group by group: `scale * sum(numbers * x)`."""
    rows, groups = x.shape[0], scale.shape[1]
    fours = rows // 4 * 4
    for n in range(first, last):
        for i in range(0, fours, 4):
            a, b, c, d = (
                np.float32(0),
                np.float32(0),
                np.float32(0),
                np.float32(0),
            )
            for g in range(groups):
                p, q, r, s = (
                    np.float32(0),
                    np.float32(0),
                    np.float32(0),
                    np.float32(0),
                )
                for k in range(g * block, (g + 1) * block):
                    v = np.float32(w[n, k])
                    p += v * x[i, k]
                    q += v * x[i + 1, k]
                    r += v * x[i + 2, k]
                    s += v * x[i + 3, k]
                a += scale[n, g] * p
                b += scale[n, g] * q
                c += scale[n, g] * r
                d += scale[n, g] * s
            y[i, n] = a
            y[i + 1, n] = b
            y[i + 2, n] = c
            y[i + 3, n] = d
        for i in range(fours, rows):
            a = np.float32(0)
            for g in range(groups):
                p = np.float32(0)
                for k in range(g * block, (g + 1) * block):
                    p += np.float32(w[n, k]) * x[i, k]
                a += scale[n, g] * p
            y[i, n] = a


def _int8_in_groups_piece(job, piece):
    w, x, y, first, last = _operands(
        job, piece, np.int8, np.float32, np.float32
    )
    q = words(job, jobs.WORDS)
    groups = q[DEPTH] // q[BLOCK]
    scale = carray(pointer(q[SCALE]), (q[OUTPUTS], groups), np.float32)
    _of_bytes_in_groups(w, scale, x, y, first, last, q[BLOCK])


def _int4_piece(job, piece):
    q = words(job, jobs.WORDS)
    n, depth, rows = q[OUTPUTS], q[DEPTH], q[ROWS]
    block = q[BLOCK]
    groups = depth // block
    w = carray(pointer(q[WEIGHT]), (n, depth // 2), np.uint8)
    scale = carray(pointer(q[SCALE]), (n, groups), np.float32)
    zero = carray(pointer(q[ZERO]), (n, groups), np.float32)
    x = carray(pointer(q[INPUTS]), (rows, depth), np.float32)
    y = carray(pointer(q[jobs.RESULT]), (rows, n), np.float32)
    totals = np.zeros((rows, groups), np.float32)
    for i in range(rows):
        for g in range(groups):
            for k in range(g * block, (g + 1) * block):
                totals[i, g] += x[i, k]
    _of_nibbles(
        w,
        scale,
        zero,
        x,
        totals,
        y,
        piece * n // q[jobs.PIECES],
        (piece + 1) * n // q[jobs.PIECES],
        groups,
        block // 2,
    )


# By the dtypes of the weight and of `x`.
KERNELS = {
    ("float32", "float32"): Kernel(0, "float32", _float32_piece),
    ("bfloat16", "float32"): Kernel(1, "float32", _bfloat16_piece),
    ("float16", "float32"): Kernel(2, "float32", _float16_piece),
    ("int8", "float32"): Kernel(3, "float32", _int8_piece),
    ("int8", "int8"): Kernel(4, "int32", _int8_with_int8_piece),
    ("int4", "float32"): Kernel(5, "float32", _int4_piece),
    ("int8_in_groups", "float32"): Kernel(6, "float32", _int8_in_groups_piece),
}
