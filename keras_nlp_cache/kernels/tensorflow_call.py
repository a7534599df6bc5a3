"""Products of our own in what XLA compiles for TensorFlow."""

import ctypes
import functools
import os

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_nlp_cache.kernels.xla_handler import prepare
from keras_nlp_cache.kernels.xla_handler import REGISTER
from keras_nlp_cache.products import kernels

_TARGET = "keras_nlp_cache_product"
_TYPES = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "int32": "i32",
    "int8": "i8",
    "uint8": "ui8",
}
# StableHLO's custom call with typed attributes, as a module of nothing else.
_MODULE = """
module @product {{
  func.func public @main({parameters}) -> {result} {{
    %y = stablehlo.custom_call @{target}({names}) {{
      api_version = 4 : i32,
      backend_config = {{
        block = {block} : i64, kind = {kind} : i64,
        weight_bytes = {weight_bytes} : i64
      }}
    }} : ({types}) -> {result}
    return %y : {result}
  }}
}}
"""
# The version of calling a module in which it is one in text.
_CALL_VERSION = 5


def multiply(form, x, weight, scale=None, zero=None):
    """`x @ weight.T` by a custom call. XLA has to compile what it is in.

    Args:
        form: `packing.Form` of the weight.
        x: float32 tensor `(rows, K)`, or int8.
        weight: Tensor as from `packing.packed()`.
        scale: Of `"int4"`, as well.
        zero: Of `"int4"`, as well.

    Returns:
        A float32 tensor `(rows, N)`, int32 if `x` is int8.
    """
    kind = kernels.kind_of(form.dtype, x.dtype.name)
    _prepare(kind)
    if scale is None:
        scale = zero = tf.zeros(1)
    arguments = weight, x, scale, zero
    shape, dtype = (x.shape[0], form.outputs), kernels.KINDS[kind].result
    names = [f"%{i}" for i in range(len(arguments))]
    types = [_type(y.shape, y.dtype.name) for y in arguments]
    module = _MODULE.format(
        target=_TARGET,
        names=", ".join(names),
        types=", ".join(types),
        parameters=", ".join(f"{x}: {y}" for x, y in zip(names, types)),
        result=_type(shape, dtype),
        block=form.packed_block,
        kind=kind,
        weight_bytes=weight.shape.num_elements() * weight.dtype.size,
    )
    (y,) = xla.call_module(
        arguments,
        version=_CALL_VERSION,
        module=module,
        Tout=[dtype],
        Sout=[tf.TensorShape(shape)],
        platforms=["CPU"],
    )
    return y


def _type(shape, dtype):
    return f"tensor<{'x'.join(map(str, shape))}x{_TYPES[dtype]}>"


@functools.cache
def _prepare(kind):
    """Compiles what a kind of product needs, and tells XLA of it once."""
    _register(prepare(kind))


class _Text(ctypes.Structure):
    """`XLA_FFI_ByteSpan`."""

    _fields_ = [("start", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class _Registration(ctypes.Structure):
    """`XLA_FFI_Handler_Register_Args`."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("name", _Text),
        ("platform", _Text),
        ("instantiate", ctypes.c_void_p),
        ("prepare", ctypes.c_void_p),
        ("initialize", ctypes.c_void_p),
        ("execute", ctypes.c_void_p),
        ("traits", ctypes.c_uint32),
    ]


@functools.cache
def _library():
    """TensorFlow's library, with the table of XLA's functions, or `None`."""
    folder = os.path.dirname(tf.__file__)
    for name in os.listdir(folder):
        if name.startswith("libtensorflow_framework."):
            library = ctypes.CDLL(os.path.join(folder, name))
            if hasattr(library, "XLA_FFI_GetApi"):
                library.XLA_FFI_GetApi.restype = ctypes.POINTER(ctypes.c_int64)
                return library
    return None


def is_available():
    """Whether TensorFlow can be told of custom calls."""
    return _library() is not None


@functools.cache
def _register(handler):
    register = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
        _library().XLA_FFI_GetApi()[REGISTER]
    )
    name = _TARGET.encode()
    arguments = _Registration(
        size=ctypes.sizeof(_Registration),
        name=_Text(name, len(name)),
        platform=_Text(b"Host", 4),
        execute=handler,
    )
    if register(ctypes.addressof(arguments)):
        raise RuntimeError(
            "Expected this TensorFlow to take a handler of XLA's "
            "foreign-function interface. It refused. Uninstall numba to "
            "generate without it, and please report the version, "
            f"{tf.__version__}."
        )
