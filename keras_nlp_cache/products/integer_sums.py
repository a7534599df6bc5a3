"""Sums of products of bytes, with a processor's own instruction for them.

`vpdpbusd` adds four products of bytes to each lane of a vector at once, of
which one has a sign and the other has none. What a compiler makes of a loop
over bytes widens them first, and a core read 11 GB/s of a weight of 75 MB.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from keras_nlp_cache.products.vectors import features
from keras_nlp_cache.products.vectors import load

# How many bytes a vector has.
BYTES = 64
_LANES = BYTES // 4
_WORDS = ir.VectorType(ir.IntType(32), _LANES)
# As what bytes with a sign are, when they are to have none: 128 more.
_UNSIGNED = ir.Constant(_WORDS, [-0x7F7F7F80] * _LANES)


def is_served():
    """Whether this processor has the instruction, for vectors of `BYTES`."""
    return all(features().get(x) for x in ("avx512f", "avx512vnni"))


def sums_of_integers(rows):
    """Code for the products of a row of a weight with some rows of `x`.

    Args:
        rows: int. How many rows of `x`.

    Returns:
        A function to compile, of int64s: where the row of the weight and those
        of `x` begin, all of them int8, how many bytes a row of `x` has, and how
        many vectors of `BYTES` are read of each. It returns an int32 for each
        row of `x`, of a weight to which 128 was added.
    """

    def generate(context, builder, signature, args):
        weight, x, stride, steps = args
        word = weight.type

        # Later versions of LLVM take this form of it, too.
        multiply = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_WORDS, [_WORDS] * 3),
            "llvm.x86.avx512.vpdpbusd.512",
        )
        zeros = ir.Constant(_WORDS, [0] * _LANES)
        totals = [
            cgutils.alloca_once_value(builder, zeros) for _ in range(rows)
        ]
        with cgutils.for_range(builder, steps) as step:
            at = builder.mul(step.index, ir.Constant(word, BYTES))
            v = load(builder, builder.add(weight, at), _WORDS)
            v = builder.xor(v, _UNSIGNED)
            for row, total in enumerate(totals):
                begin = builder.mul(stride, ir.Constant(word, row))
                place = builder.add(builder.add(x, begin), at)
                u = load(builder, place, _WORDS)
                added = builder.call(multiply, [builder.load(total), v, u])
                builder.store(added, total)
        add_up = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.IntType(32), [_WORDS]),
            f"llvm.vector.reduce.add.v{_LANES}i32",
        )
        results = [builder.call(add_up, [builder.load(x)]) for x in totals]
        return context.make_tuple(builder, signature.return_type, results)

    result = types.UniTuple(types.int32, rows)

    @intrinsic
    def sums(context, weight, x, stride, steps):
        return result(*[types.int64] * 4), generate

    return sums
