"""Kernels in what JAX compiles."""

import ctypes
import functools

import jax
import numpy as np

from keras_nlp_cache.kernels.once import once
from keras_nlp_cache.kernels.xla_handler import attributes
from keras_nlp_cache.kernels.xla_handler import prepare

_TARGET = "keras_nlp_cache_kernel"


def call(kernel, arguments, shape, dtype, sizes, pieces):
    """What `Kernel` does on JAX, by a custom call."""
    _prepare(kernel)
    function = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, dtype))
    values = attributes(kernel, arguments, sizes, pieces)
    return function(
        *[x for x in arguments if x is not None],
        **{
            name: np.asarray(value, np.int64)
            if isinstance(value, tuple)
            else np.int64(value)
            for name, value in values.items()
        },
    )


@once
def _prepare(kernel):
    """Compiles a kernel, and tells JAX of it once."""
    _register(prepare(kernel))


@functools.cache
def _register(handler):
    jax.ffi.register_ffi_target(
        _TARGET, jax.ffi.pycapsule(ctypes.c_void_p(handler)), platform="cpu"
    )
