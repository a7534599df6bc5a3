"""What numba lacks to share memory with C and with other threads."""

import numpy as np
from llvmlite import ir
from numba import carray
from numba import njit
from numba import types
from numba.extending import intrinsic

_WORD = ir.IntType(64)

allocate = types.ExternalFunction("malloc", types.int64(types.int64))
release = types.ExternalFunction("free", types.void(types.int64))


@intrinsic
def pointer(typing_context, address):
    """The pointer that an int64 is the address of."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(inline="always")
def words(address, count):
    """Memory as an array of int64, as C structures are made of."""
    return carray(pointer(address), count, np.int64)


@intrinsic
def fetch_add(typing_context, address, amount):
    """Adds to the int64 at an address at once, and returns what it was."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def read_now(typing_context, address):
    """The int64 at an address as other threads have left it."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], _WORD.as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def swap(typing_context, address, value):
    """Replaces the int64 at an address at once, and returns what it was."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], _WORD.as_pointer())
        return builder.atomic_rmw("xchg", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def call_with_one(typing_context, function, argument):
    """Calls `int64 function(int64)` at an address."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_WORD, [_WORD])
        function = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(function, [args[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def call_with_two(typing_context, function, first, second):
    """Calls `void function(int64, int64)` at an address."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_WORD, _WORD])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def symbol(name):
    """A function to compile, that returns the address of a symbol.

    What is compiled can be kept on disk, where an address could not: it is
    looked up when the code is loaded. See `llvmlite.binding.add_symbol()`.
    """

    @intrinsic
    def address(typing_context):
        def generate(context, builder, signature, args):
            place = builder.module.globals.get(name)
            if place is None:
                place = ir.GlobalVariable(builder.module, _WORD, name)
            return builder.ptrtoint(place, _WORD)

        return types.int64(), generate

    return address


@intrinsic
def from_bfloat16(typing_context, bits):
    """The float32 of a bfloat16, of which the bits are an uint16."""

    def generate(context, builder, signature, args):
        wide = builder.zext(args[0], ir.IntType(32))
        wide = builder.shl(wide, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def from_float16(typing_context, bits):
    """The float32 of a float16, of which the bits are an uint16."""

    def generate(context, builder, signature, args):
        half = builder.bitcast(args[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def to_bfloat16(typing_context, x):
    """The bits of the bfloat16 that is nearest to a float32, an uint16."""

    def generate(context, builder, signature, args):
        word, short = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(args[0], word)
        upper = builder.lshr(bits, ir.Constant(word, 16))
        # Half of what is cut off, and of two that are as near the even one.
        odd = builder.and_(upper, ir.Constant(word, 1))
        half = builder.add(odd, ir.Constant(word, 0x7FFF))
        nearest = builder.lshr(builder.add(bits, half), ir.Constant(word, 16))
        quiet = builder.or_(upper, ir.Constant(word, 0x40))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, quiet, nearest), short)

    return types.uint16(types.float32), generate


@intrinsic
def to_float16(typing_context, x):
    """The bits of the float16 that is nearest to a float32, an uint16."""

    def generate(context, builder, signature, args):
        half = builder.fptrunc(args[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def power_of_two(typing_context, exponent):
    """The float32 of an exponent from -126 to 127, an int32."""

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.add(args[0], ir.Constant(word, 127))
        bits = builder.shl(bits, ir.Constant(word, 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate
