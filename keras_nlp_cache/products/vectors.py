"""Vectors that code is written with, as large as a processor's registers."""

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils

from keras_nlp_cache.products.packing import SPAN

_FLOAT = ir.FloatType()


def features():
    """What the processor has, by LLVM's names, as a dictionary to bool.

    Nothing is known if numba was told to compile for another one.
    """
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return {}
    return llvmlite.binding.get_host_cpu_features()


# How many numbers a vector has: what a register takes.
LANES = SPAN if features().get("avx512f") else SPAN // 2
FLOATS = ir.VectorType(_FLOAT, LANES)


def load(builder, address, kind):
    """What lies at an address, an integer, that need not be aligned."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), "", 1)


def total_of(builder, vectors):
    """The sum of all lanes of some vectors of floats."""
    first, *others = vectors
    for other in others:
        first = builder.fadd(first, other)
    add_up = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_FLOAT, [_FLOAT, FLOATS]),
        f"llvm.vector.reduce.fadd.v{LANES}f32",
    )
    zero = ir.Constant(_FLOAT, 0.0)
    # In pairs, in an order that is the same for all.
    return builder.call(add_up, [zero, first], fastmath=("fast",))


def splat(builder, value):
    """A vector that is one number in all lanes."""
    kind = ir.VectorType(_FLOAT, LANES)
    index = ir.Constant(ir.IntType(32), 0)
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, value, index)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None)
    return builder.shuffle_vector(one, undefined, mask)
