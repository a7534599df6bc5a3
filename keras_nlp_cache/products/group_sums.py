"""Sums over weights in groups, in vectors that are written down as such.

A group has a scale of its own, and is short: what a compiler makes of a loop
over it adds up the lanes of a vector at the end of each. Here lanes stay apart,
scaled, until the end of a row. Measured on one core with AVX-512, 1536 x 640:
48 microseconds in place of 112 for nibbles in groups of 128, with their zeros,
and 57 in place of 896 for bytes in groups of 32.

Rows are read one after the other, as memory is fastest: of 75 MB, a core read
26 GB/s, and 11 of two rows at a time.
"""

import itertools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from keras_nlp_cache.products.vectors import FLOATS
from keras_nlp_cache.products.vectors import LANES
from keras_nlp_cache.products.vectors import load
from keras_nlp_cache.products.vectors import splat
from keras_nlp_cache.products.vectors import total_of

_BYTE, _FLOAT = ir.IntType(8), ir.FloatType()


def sums_in_groups(rows, has_nibbles):
    """Code for the products of a row of a weight with some rows of `x`.

    Args:
        rows: int. How many rows of `x`.
        has_nibbles: bool. Whether a byte is two numbers from 0 to 15, of the
            first half of a group and, in its upper bits, of the second, from
            which a zero is to be subtracted. Else it is one from -128 to 127.

    Returns:
        A function to compile, of int64s: where the bytes begin, where the
        float32 scales and zeros, where the float32 rows of `x` and what their
        groups sum up to, `(rows, groups, LANES)`, how many numbers a row of `x`
        has, how many groups there are and how many bytes each has, which is a
        multiple of `SPAN`. It returns a float32 for each row of `x`, which does
        not depend on how many there are.
    """
    bytes_ = ir.VectorType(_BYTE, LANES)
    wide = ir.VectorType(ir.IntType(32), LANES)
    halves = 2 if has_nibbles else 1
    # Not "fast", by which a compiler would add up in an order of its own.
    flags = ("contract",)

    def numbers(builder, values):
        """Vectors of floats, of the bytes in one."""
        if not has_nibbles:
            return [builder.sitofp(builder.sext(values, wide), FLOATS)]
        values = builder.zext(values, wide)
        low = builder.and_(values, ir.Constant(wide, [15] * LANES))
        high = builder.lshr(values, ir.Constant(wide, [4] * LANES))
        # With a sign, which a vector converts at once.
        return [builder.sitofp(x, FLOATS) for x in (low, high)]

    def add(builder, place, x, y):
        """Adds a product to a variable."""
        product = builder.fmul(x, y, flags=flags)
        total = builder.fadd(builder.load(place), product, flags=flags)
        builder.store(total, place)

    def generate(context, builder, signature, args):
        weight, scale, zero, x, sums, stride, groups, length = args
        word = weight.type

        def constant(value):
            return ir.Constant(word, value)

        def plus(place, offset, scale=1):
            if scale != 1:
                offset = builder.mul(offset, constant(scale))
            return builder.add(place, offset)

        def number_at(values, index):
            """A vector that is one of some float32 in all lanes."""
            return splat(builder, load(builder, plus(values, index, 4), _FLOAT))

        zeros = ir.Constant(FLOATS, [0.0] * LANES)
        totals = [
            cgutils.alloca_once_value(builder, zeros) for _ in range(rows)
        ]
        # Each sum waits for the one before it, and halves not for each other.
        inner = [
            [cgutils.alloca_once(builder, FLOATS) for _ in range(halves)]
            for _ in range(rows)
        ]
        steps = builder.udiv(length, constant(LANES))
        with cgutils.for_range(builder, groups) as group:
            begin = builder.mul(group.index, length)
            for place in itertools.chain(*inner):
                builder.store(zeros, place)
            with cgutils.for_range(builder, steps) as step:
                at = builder.mul(step.index, constant(LANES))
                place = plus(plus(weight, begin), at)
                for half, v in enumerate(
                    numbers(builder, load(builder, place, bytes_))
                ):
                    column = plus(at, begin, halves)
                    if half:
                        column = plus(column, length)
                    for row in range(rows):
                        index = builder.mul(stride, constant(row))
                        index = plus(column, index)
                        u = load(builder, plus(x, index, 4), FLOATS)
                        add(builder, inner[row][half], v, u)
            factors = number_at(scale, group.index)
            for row, total in enumerate(totals):
                place, *further = inner[row]
                if has_nibbles:
                    index = builder.mul(groups, constant(row))
                    index = builder.add(index, group.index)
                    index = builder.mul(index, constant(LANES))
                    u = load(builder, plus(sums, index, 4), FLOATS)
                    v = builder.fneg(number_at(zero, group.index))
                    add(builder, place, v, u)
                found = builder.load(place)
                for other in further:
                    found = builder.fadd(found, builder.load(other))
                add(builder, total, found, factors)
        results = [total_of(builder, [builder.load(x)]) for x in totals]
        return context.make_tuple(builder, signature.return_type, results)

    result = types.UniTuple(types.float32, rows)

    @intrinsic
    def sums(context, weight, scale, zero, x, sums, stride, groups, length):
        return result(*[types.int64] * 8), generate

    return sums
