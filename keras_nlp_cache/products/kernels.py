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
from keras_nlp_cache.products import operands
from keras_nlp_cache.products.vector_sums import sums_in_groups


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

    def product(w, x, y):
        (count, depth), rows = w.shape, x.shape[0]
        fours, pairs = rows // 4 * 4, count // 2 * 2
        # Eight sums at a time are enough to keep a core busy.
        for n in range(0, pairs, 2) if fours else range(0):
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
        for n in range(count):
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
def _weight(q, first, last, dtype, size):
    """The rows of a weight that a piece multiplies with."""
    place = q[operands.WEIGHT] + first * q[operands.DEPTH] * size
    shape = last - first, q[operands.DEPTH]
    return carray(pointer(place), shape, dtype)


def _float32_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    y = np.empty((q[operands.ROWS], last - first), np.float32)
    w = _weight(q, first, last, np.float32, 4)
    _of_floats(w, operands.inputs(q), y)
    operands.write(q, y, first)


def _bfloat16_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    y = np.empty((q[operands.ROWS], last - first), np.float32)
    w = _weight(q, first, last, np.uint16, 2)
    _of_bfloat16s(w, operands.inputs(q), y)
    operands.write(q, y, first)


def _float16_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    y = np.empty((q[operands.ROWS], last - first), np.float32)
    w = _weight(q, first, last, np.uint16, 2)
    _of_float16s(w, operands.inputs(q), y)
    operands.write(q, y, first)


def _int8_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    y = np.empty((q[operands.ROWS], last - first), np.float32)
    w = _weight(q, first, last, np.int8, 1)
    _of_floats(w, operands.inputs(q), y)
    operands.divide(q, y, first, np.ones(y.shape[0], np.float32))
    operands.write(q, y, first)


def _int8_with_rounded_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    x, scales = operands.rounded_inputs(job, q)
    totals = np.empty((x.shape[0], last - first), np.int32)
    _of_integers(_weight(q, first, last, np.int8, 1), x, totals)
    y = totals.astype(np.float32)
    operands.divide(q, y, first, scales)
    operands.write(q, y, first)


_four_of_nibbles = sums_in_groups(4, has_nibbles=True)
_one_of_nibbles = sums_in_groups(1, has_nibbles=True)
_four_of_bytes = sums_in_groups(4, has_nibbles=False)
_one_of_bytes = sums_in_groups(1, has_nibbles=False)


def _sums_by_group(name, four, one, halves):
    """Code for products with weights in groups, named as those above."""

    def product(q, x, y, first):
        rows, depth = x.shape
        block = q[operands.PACKED_BLOCK]
        groups, length = depth // block, block // halves
        inputs, size = x.ctypes.data, x.itemsize
        for n in range(y.shape[1]):
            w = q[operands.WEIGHT] + (first + n) * groups * length
            scale = q[operands.SCALE] + (first + n) * groups * size
            for i in range(0, rows // 4 * 4, 4):
                place = inputs + i * depth * size
                a, b, c, d = four(w, scale, place, depth, groups, length)
                y[i, n], y[i + 1, n], y[i + 2, n], y[i + 3, n] = a, b, c, d
            for i in range(rows // 4 * 4, rows):
                place = inputs + i * depth * size
                (y[i, n],) = one(w, scale, place, depth, groups, length)

    product.__name__ = product.__qualname__ = name
    return numba.njit(product)


_of_nibbles = _sums_by_group(
    "products_of_nibbles", _four_of_nibbles, _one_of_nibbles, 2
)
_of_bytes = _sums_by_group(
    "products_of_bytes", _four_of_bytes, _one_of_bytes, 1
)


def _int8_in_groups_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    x = operands.inputs(q)
    y = np.empty((x.shape[0], last - first), np.float32)
    _of_bytes(q, x, y, first)
    operands.write(q, y, first)


@numba.njit(fastmath=True)
def _subtract_zeros(q, x, y, first):
    """What zeros make up in a product: `sum(scale * zero * sum(x))`."""
    block = q[operands.PACKED_BLOCK]
    groups = x.shape[1] // block
    totals = np.zeros(groups, np.float32)
    offset, shape = 4 * first * groups, (y.shape[1], groups)
    scale = carray(pointer(q[operands.SCALE] + offset), shape, np.float32)
    zero = carray(pointer(q[operands.ZERO] + offset), shape, np.float32)
    for i in range(x.shape[0]):
        for g in range(groups):
            totals[g] = x[i, g * block : (g + 1) * block].sum()
        for n in range(y.shape[1]):
            total = np.float32(0)
            for g in range(groups):
                total += scale[n, g] * zero[n, g] * totals[g]
            y[i, n] -= total


def _int4_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    x = operands.inputs(q)
    y = np.empty((x.shape[0], last - first), np.float32)
    _of_nibbles(q, x, y, first)
    _subtract_zeros(q, x, y, first)
    operands.write(q, y, first)


# By the dtype of the weight. What they return is of the dtype of `x`.
KERNELS = {
    "float32": Kernel(0, _float32_piece),
    "bfloat16": Kernel(1, _bfloat16_piece),
    "float16": Kernel(2, _float16_piece),
    "int8": Kernel(3, _int8_piece),
    "int4": Kernel(5, _int4_piece),
    "int8_in_groups": Kernel(6, _int8_in_groups_piece),
}
# Rounds `x` to integers, as Keras does, and multiplies those.
INT8_WITH_ROUNDED = Kernel(4, _int8_with_rounded_piece)
