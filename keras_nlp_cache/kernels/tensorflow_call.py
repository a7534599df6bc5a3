"""Kernels in what XLA compiles for TensorFlow."""

import ctypes
import functools
import os

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_nlp_cache.kernels.once import once
from keras_nlp_cache.kernels.xla_handler import attributes
from keras_nlp_cache.kernels.xla_handler import prepare
from keras_nlp_cache.kernels.xla_handler import REGISTER

_TARGET = "keras_nlp_cache_kernel"
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
module @kernel {{
  func.func public @main({parameters}) -> {result} {{
    %y = stablehlo.custom_call @{target}({names}) {{
      api_version = 4 : i32,
      backend_config = {{
        given = {given} : i64, number = {number} : i64,
        pieces = {pieces} : i64, sizes = array<i64: {sizes}>
      }}
    }} : ({types}) -> {result}
    return %y : {result}
  }}
}}
"""
# The version of calling a module in which it is one in text.
_CALL_VERSION = 5


def call(kernel, arguments, shape, dtype, sizes, pieces):
    """What `Kernel` does in what XLA compiles for TensorFlow."""
    _prepare(kernel)
    values = attributes(kernel, arguments, sizes, pieces)
    values["sizes"] = ", ".join(map(str, sizes))
    arguments = [x for x in arguments if x is not None]
    names = [f"%{i}" for i in range(len(arguments))]
    types = [_type(y.shape, y.dtype.name) for y in arguments]
    module = _MODULE.format(
        target=_TARGET,
        names=", ".join(names),
        types=", ".join(types),
        parameters=", ".join(f"{x}: {y}" for x, y in zip(names, types)),
        result=_type(shape, dtype),
        **values,
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
    return f"tensor<{''.join(f'{size}x' for size in shape)}{_TYPES[dtype]}>"


@once
def _prepare(kernel):
    """Compiles a kernel, and tells XLA of it once."""
    _register(prepare(kernel))


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
