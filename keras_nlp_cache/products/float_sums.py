"""Sums of products of floats, in vectors that are written down as such.

What limits these is how fast memory is read, and a core asks for the next lines
of memory on its own only where it computes little between them: two rows of a
weight side by side, four rows of `x` each, which is least to load and what a
compiler does well, read 8 GB/s of 113 MB, of what one row of `x` reads at 24.
So a weight is read once, row by row, with up to eight rows of `x`, which ask
for memory ahead of time. Measured on one core with AVX-512, 49152 x 576 in
float32: 7.8 milliseconds in place of 12.6 for four rows, and 10.6 of 13.5 for
eight. Of sixteen and more, it is to load `x` that takes the time.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from keras_nlp_cache.products.vectors import FLOATS
from keras_nlp_cache.products.vectors import LANES
from keras_nlp_cache.products.vectors import load
from keras_nlp_cache.products.vectors import total_of

# How many numbers are read at a time of each row.
SPAN = 4 * LANES
# How many sums each row of `x` has at a time, by how many rows there are: a sum
# waits for the one before it, and there are registers for eight or so.
_SUMS = {1: 4, 4: 2, 8: 1}
# How many bytes ahead memory is asked for: 1024 to 8192 took as long.
_AHEAD = 4096
_LINE = 64


def _of_float32(builder, values):
    return values


def _of_bfloat16(builder, values):
    wide = ir.VectorType(ir.IntType(32), LANES)
    sixteen = ir.Constant(wide, [16] * LANES)
    return builder.bitcast(
        builder.shl(builder.zext(values, wide), sixteen), FLOATS
    )


def _of_float16(builder, values):
    halves = ir.VectorType(ir.HalfType(), LANES)
    return builder.fpext(builder.bitcast(values, halves), FLOATS)


def _of_int8(builder, values):
    wide = ir.VectorType(ir.IntType(32), LANES)
    return builder.sitofp(builder.sext(values, wide), FLOATS)


# By the dtype of a weight: what a number of it is read as, of how many bytes,
# and how that becomes a float32.
_READ = {
    "float32": (ir.FloatType(), 4, _of_float32),
    "bfloat16": (ir.IntType(16), 2, _of_bfloat16),
    "float16": (ir.IntType(16), 2, _of_float16),
    "int8": (ir.IntType(8), 1, _of_int8),
}


def sums_of_floats(rows, dtype, outputs=1):
    """Code for the products of a row of a weight with some rows of `x`.

    Args:
        rows: int, of `x`: 1, 4 or 8.
        dtype: str, of the weight: `"float32"`, `"bfloat16"`, `"float16"` or
            `"int8"`.
        outputs: int. How many rows of the weight.

    Returns:
        A function to compile, of int64s: where the first row of the weight and
        the float32 rows of `x` begin, how many numbers a row has, and how many
        times `SPAN` of them are to be read. It returns a float32 for each row
        of the weight and each of `x`, those of the first row of the weight
        first.
    """
    kind, size, widened = _READ[dtype]
    values = ir.VectorType(kind, LANES)
    count = _SUMS[rows]

    def generate(context, builder, signature, args):
        weight, x, depth, steps = args

        def plus(place, index, scale):
            scale = ir.Constant(index.type, scale)
            return builder.add(place, builder.mul(index, scale))

        zeros = ir.Constant(FLOATS, [0.0] * LANES)
        totals = [
            [cgutils.alloca_once_value(builder, zeros) for _ in range(count)]
            for _ in range(outputs * rows)
        ]
        begins = [weight]
        for _ in range(1, outputs):
            begins.append(plus(begins[-1], depth, size))
        with cgutils.for_range(builder, steps) as step:
            places = [plus(x, step.index, SPAN * size) for x in begins]
            for line in range(0, SPAN * size, _LINE) if rows == 8 else ():
                for place in places:
                    _ask_for(builder, place, line + _AHEAD)
            for part in range(SPAN // LANES):
                offset = ir.Constant(depth.type, part * LANES * size)
                loaded = [
                    widened(
                        builder,
                        load(builder, builder.add(place, offset), values),
                    )
                    for place in places
                ]
                for row in range(rows):
                    at = ir.Constant(depth.type, row)
                    at = plus(x, builder.mul(depth, at), 4)
                    at = plus(at, step.index, SPAN * 4)
                    offset = ir.Constant(depth.type, part * LANES * 4)
                    u = load(builder, builder.add(at, offset), FLOATS)
                    for output, v in enumerate(loaded):
                        total = totals[output * rows + row][part % count]
                        product = builder.fmul(v, u, flags=("contract",))
                        added = builder.fadd(
                            builder.load(total), product, flags=("contract",)
                        )
                        builder.store(added, total)
        results = [total_of(builder, map(builder.load, x)) for x in totals]
        return context.make_tuple(builder, signature.return_type, results)

    result = types.UniTuple(types.float32, outputs * rows)

    @intrinsic
    def sums(context, weight, x, depth, steps):
        return result(*[types.int64] * 4), generate

    return sums


def _ask_for(builder, address, offset):
    """Has memory brought near that is soon to be read.

    What lies behind the end of a weight is not read, and may be asked for.
    """
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    ask = builder.module.declare_intrinsic(
        "llvm.prefetch",
        [pointer],
        ir.FunctionType(ir.VoidType(), [pointer, *[number] * 3]),
    )
    place = builder.add(address, ir.Constant(address.type, offset))
    # To read, to be kept, and no code.
    flags = [ir.Constant(number, x) for x in (0, 3, 1)]
    builder.call(ask, [builder.inttoptr(place, pointer), *flags])
