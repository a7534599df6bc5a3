"""Products of a few rows with a weight, one kernel for each kind of weight.

A weight is `(N, K)`, a row of it for each output, so that what is summed over
lies side by side: read as Keras keeps it, `(K, N)`, it takes 2 to 5 times as
long. Up to eight rows of `x` meet a row of the weight at a time, so that what
is read and widened once is used several times.

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
from keras_nlp_cache.products.float_sums import SPAN
from keras_nlp_cache.products.float_sums import sums_of_floats
from keras_nlp_cache.products.group_sums import sums_in_groups
from keras_nlp_cache.products.integer_sums import BYTES
from keras_nlp_cache.products.integer_sums import is_served
from keras_nlp_cache.products.integer_sums import sums_of_integers
from keras_nlp_cache.products.vectors import LANES


@numba.njit
def _float32(x):
    return np.float32(x)


@numba.njit
def _int32(x):
    return np.int32(x)


def _rest(name, wide, wide_x, zero):
    """Code that adds the products of columns, from some on, in a loop.

    Each has a name of its own. Code that is loaded from disk finds what it
    calls by name, and would take that of another kind for its own.
    """

    def add(w, x, y, begin):
        (count, depth), rows = w.shape, x.shape[0]
        fours = rows // 4 * 4
        for n in range(count if begin < depth else 0):
            v = w[n]
            for i in range(0, fours, 4):
                p, q, r, s = x[i], x[i + 1], x[i + 2], x[i + 3]
                a, b, c, d = zero, zero, zero, zero
                for k in range(begin, depth):
                    t = wide(v[k])
                    a += t * wide_x(p[k])
                    b += t * wide_x(q[k])
                    c += t * wide_x(r[k])
                    d += t * wide_x(s[k])
                y[i, n] += a
                y[i + 1, n] += b
                y[i + 2, n] += c
                y[i + 3, n] += d
            for i in range(fours, rows):
                p, a = x[i], zero
                for k in range(begin, depth):
                    a += wide(v[k]) * wide_x(p[k])
                y[i, n] += a

    add.__name__ = add.__qualname__ = name
    return numba.njit(fastmath=True)(add)


def _of_floats(dtype, wide):
    """Code for products of a kind of weights with floats."""
    of_pairs = sums_of_floats(8, dtype, outputs=2)
    of_eight = sums_of_floats(8, dtype)
    of_four = sums_of_floats(4, dtype)
    of_one = sums_of_floats(1, dtype)
    add_rest = _rest(f"rest_of_{dtype}", wide, _float32, np.float32(0))

    def product(w, x, y):
        (count, depth), rows = w.shape, x.shape[0]
        inputs, steps = x.ctypes.data, depth // SPAN
        eights, fours = rows // 8 * 8, rows // 4 * 4
        pairs = count // 2 * 2 if rows >= 16 else 0
        for n in range(0, pairs, 2):
            v = w.ctypes.data + n * w.strides[0]
            for i in range(0, eights, 8):
                found = of_pairs(v, inputs + 4 * i * depth, depth, steps)
                for j in range(8):
                    y[i + j, n], y[i + j, n + 1] = found[j], found[8 + j]
        for n in range(count):
            v = w.ctypes.data + n * w.strides[0]
            for i in range(0 if n >= pairs else eights, eights, 8):
                found = of_eight(v, inputs + 4 * i * depth, depth, steps)
                for j in range(8):
                    y[i + j, n] = found[j]
            for i in range(eights, fours, 4):
                found = of_four(v, inputs + 4 * i * depth, depth, steps)
                for j in range(4):
                    y[i + j, n] = found[j]
            for i in range(fours, rows):
                (y[i, n],) = of_one(v, inputs + 4 * i * depth, depth, steps)
        add_rest(w, x, y, steps * SPAN)

    product.__name__ = product.__qualname__ = f"products_of_{dtype}"
    return numba.njit(product)


_of_float32s = _of_floats("float32", _float32)
_of_bfloat16s = _of_floats("bfloat16", from_bfloat16)
_of_float16s = _of_floats("float16", from_float16)
_of_int8s = _of_floats("int8", _float32)
_add_rest_of_integers = _rest("rest_of_integers", _int32, _int32, np.int32(0))


@numba.njit
def _of_integers_in_a_loop(w, x, y):
    y[:] = 0
    _add_rest_of_integers(w, x, y, 0)


_of_eight_rows = sums_of_integers(8)
_of_four_rows = sums_of_integers(4)
_of_one_row = sums_of_integers(1)


@numba.njit
def _of_integers_in_vectors(w, x, y):
    (count, depth), rows = w.shape, x.shape[0]
    inputs, steps = x.ctypes.data, depth // BYTES
    eights, fours = rows // 8 * 8, rows // 4 * 4
    # That of 128, which is added to all weights.
    added = np.empty(rows, np.int32)
    for i in range(rows):
        total = np.int32(0)
        for k in range(steps * BYTES):
            total += np.int32(x[i, k])
        added[i] = 128 * total
    for n in range(count):
        v = w.ctypes.data + n * depth
        for i in range(0, eights, 8):
            found = _of_eight_rows(v, inputs + i * depth, depth, steps)
            for j in range(8):
                y[i + j, n] = found[j] - added[i + j]
        for i in range(eights, fours, 4):
            found = _of_four_rows(v, inputs + i * depth, depth, steps)
            for j in range(4):
                y[i + j, n] = found[j] - added[i + j]
        for i in range(fours, rows):
            (total,) = _of_one_row(v, inputs + i * depth, depth, steps)
            y[i, n] = total - added[i]
    _add_rest_of_integers(w, x, y, steps * BYTES)


_of_integers = (
    _of_integers_in_vectors if is_served() else _of_integers_in_a_loop
)


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
    _of_float32s(w, operands.inputs(q), y)
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
    _of_int8s(w, operands.inputs(q), y)
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


@numba.njit
def _totals(x, block, lanes):
    """What groups of inputs sum up to, lane by lane of a vector.

    Args:
        x: float32 array `(rows, depth)`.
        block: int64. How many numbers a group has.
        lanes: int64. How many a vector has, 0 for nothing.

    Returns:
        float32 array `(rows, groups, lanes)`.
    """
    rows, depth = x.shape
    totals = np.zeros((rows, depth // block, lanes), np.float32)
    for i in range(rows if lanes else 0):
        for g in range(depth // block):
            for k in range(g * block, (g + 1) * block, lanes):
                for lane in range(lanes):
                    totals[i, g, lane] += x[i, k + lane]
    return totals


@numba.njit
def _places(q, x, totals, length, i, n):
    """What to call `sums_in_groups()` with, from a row and an output on."""
    depth, groups = x.shape[1], totals.shape[1]
    return (
        q[operands.WEIGHT] + n * groups * length,
        q[operands.SCALE] + 4 * n * groups,
        q[operands.ZERO] + 4 * n * groups,
        x.ctypes.data + i * x.strides[0],
        totals.ctypes.data + i * totals.strides[0],
        depth,
        groups,
        length,
    )


def _sums_by_group(name, has_nibbles):
    """Code for products with weights in groups, named as those above."""
    of_four = sums_in_groups(4, has_nibbles)
    of_one = sums_in_groups(1, has_nibbles)
    halves, lanes = (2, LANES) if has_nibbles else (1, 0)

    def product(q, x, y, first):
        rows, count = y.shape
        block = q[operands.PACKED_BLOCK]
        length, totals = block // halves, _totals(x, block, lanes)
        fours = rows // 4 * 4
        for n in range(count):
            for i in range(0, fours, 4):
                place = _places(q, x, totals, length, i, first + n)
                a, b, c, d = of_four(*place)
                y[i, n], y[i + 1, n], y[i + 2, n], y[i + 3, n] = a, b, c, d
            for i in range(fours, rows):
                place = _places(q, x, totals, length, i, first + n)
                (y[i, n],) = of_one(*place)

    product.__name__ = product.__qualname__ = name
    return numba.njit(product)


_of_nibbles = _sums_by_group("products_of_nibbles", has_nibbles=True)
_of_bytes = _sums_by_group("products_of_bytes", has_nibbles=False)


def _int8_in_groups_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    x = operands.inputs(q)
    y = np.empty((x.shape[0], last - first), np.float32)
    _of_bytes(q, x, y, first)
    operands.write(q, y, first)


def _int4_piece(job, piece):
    q = words(job, jobs.WORDS)
    first, last = operands.outputs_of(q, piece)
    x = operands.inputs(q)
    y = np.empty((x.shape[0], last - first), np.float32)
    _of_nibbles(q, x, y, first)
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
