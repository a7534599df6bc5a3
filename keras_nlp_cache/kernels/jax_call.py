"""Products of our own in what JAX compiles."""

import ctypes
import functools

import jax
import numpy as np

from keras_nlp_cache.kernels.xla_handler import prepare
from keras_nlp_cache.products.kernels import kind_of
from keras_nlp_cache.products.kernels import KINDS

_TARGET = "keras_nlp_cache_product"


def multiply(form, x, weight, scale=None, zero=None):
    """`x @ weight.T` by a custom call.

    Args:
        form: `packing.Form` of the weight.
        x: float32 array `(rows, K)`, or int8.
        weight: Array as from `packing.packed()`.
        scale: Of `"int4"`, as well.
        zero: Of `"int4"`, as well.

    Returns:
        A float32 array `(rows, N)`, int32 if `x` is int8.
    """
    kind = kind_of(form.dtype, x.dtype)
    _prepare(kind)
    nothing = np.zeros(1, np.float32)
    call = jax.ffi.ffi_call(
        _TARGET,
        jax.ShapeDtypeStruct((x.shape[0], form.outputs), KINDS[kind].result),
    )
    return call(
        weight,
        x,
        nothing if scale is None else scale,
        nothing if zero is None else zero,
        block=np.int64(form.packed_block),
        kind=np.int64(kind),
        weight_bytes=np.int64(weight.size * weight.dtype.itemsize),
    )


@functools.cache
def _prepare(kind):
    """Compiles what a kind of product needs, and tells JAX of it once."""
    _register(prepare(kind))


@functools.cache
def _register(handler):
    jax.ffi.register_ffi_target(
        _TARGET, jax.ffi.pycapsule(ctypes.c_void_p(handler)), platform="cpu"
    )
