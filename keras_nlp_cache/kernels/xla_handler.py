"""A product as a custom call of XLA, in its stable foreign-function interface.

JAX and TensorFlow bring the same interface, each in its own version. The
structures of its C header, `xla/ffi/api/c_api.h`, are read as words of eight
bytes. Threads are those that XLA runs its own operations on.
"""

import functools

import llvmlite.binding
import numba
import numpy as np
from numba import types

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.compiling import compiled
from keras_nlp_cache.kernels.machine_words import call_with_one
from keras_nlp_cache.kernels.machine_words import symbol
from keras_nlp_cache.kernels.machine_words import words
from keras_nlp_cache.products import kernels

# What compiled code looks up: who helps, then the kernel of each kind.
_MOST_KINDS = 15
_TABLE = np.zeros(1 + _MOST_KINDS, np.int64)
_TABLE_SYMBOL = "keras_nlp_cache_products"
llvmlite.binding.add_symbol(_TABLE_SYMBOL, _TABLE.ctypes.data)
_table = symbol(_TABLE_SYMBOL)

# Places in `XLA_FFI_CallFrame`.
_FRAME = 21
_EXTENSION, _API, _CONTEXT, _ARGS, _RESULTS, _ATTRIBUTES = 1, 2, 3, 9, 14, 20
# In `XLA_FFI_Buffer`.
_BUFFER, _DATA, _DIMS = 6, 3, 5
# In `XLA_FFI_Api`.
_API_WORDS, _VERSION, REGISTER, _SCHEDULE, _COUNT_THREADS = 19, 4, 9, 17, 18
# `XLA_FFI_Extension_Metadata`: asks which version the handler speaks.
_METADATA = 1


@numba.njit(inline="always")
def _attribute(frame, index):
    """An integer, from attributes in the order of their names."""
    scalar = words(words(frame[_ATTRIBUTES], index + 1)[index], 2)
    return words(scalar[1], 1)[0]


@numba.njit
def _ask_for_help(job, frame, count_threads, schedule):
    """Has the threads of XLA come, as many as there are pieces for."""
    arguments, count = np.zeros(5, np.int64), np.zeros(1, np.int64)
    arguments[0] = 32  # How long the structure is.
    arguments[2] = frame[_CONTEXT]
    arguments[3] = count.ctypes.data
    call_with_one(count_threads, arguments.ctypes.data)
    q = words(job, jobs.WORDS)
    helpers = min(q[jobs.PIECES], count[0]) - 1
    if helpers < 1:
        return
    q[jobs.USERS] = 1 + helpers
    arguments[0] = 40
    arguments[3] = words(_table(), 1)[0]
    arguments[4] = job
    for _ in range(helpers):
        call_with_one(schedule, arguments.ctypes.data)


def _handle(address):
    """Runs a product: `(weight, x, scale, zero) -> y`.

    The weight is `(N, ...)` and `x` `(rows, K)`. The attributes are `block`,
    `kind` and `weight_bytes`.
    """
    frame = words(address, _FRAME)
    api = words(frame[_API], _API_WORDS)
    if frame[_EXTENSION] != 0:
        extension = words(frame[_EXTENSION], 4)
        if extension[1] & 0xFFFFFFFF == _METADATA:
            metadata = words(extension[3], 5)
            # In all versions so far, and those of the same major number, what
            # is read here stands in the same place.
            minor = api[_VERSION] >> 32
            metadata[3] = minor << 32
            metadata[4] = 0
            return 0
    args = words(frame[_ARGS], 4)
    weight, x = words(args[0], _BUFFER), words(args[1], _BUFFER)
    y = words(words(frame[_RESULTS], 1)[0], _BUFFER)
    x_dims, y_dims = words(x[_DIMS], 2), words(y[_DIMS], 2)
    job = jobs.new_job(_attribute(frame, 2), x_dims[0])
    q = words(job, jobs.WORDS)
    q[jobs.KERNEL] = words(_table(), 1 + _MOST_KINDS)[1 + _attribute(frame, 1)]
    q[jobs.WEIGHT] = weight[_DATA]
    q[jobs.INPUTS] = x[_DATA]
    q[jobs.RESULTS] = y[_DATA]
    q[jobs.SCALE] = words(args[2], _BUFFER)[_DATA]
    q[jobs.ZERO] = words(args[3], _BUFFER)[_DATA]
    q[jobs.OUTPUTS] = y_dims[1]
    q[jobs.DEPTH] = x_dims[1]
    q[jobs.ROWS] = x_dims[0]
    q[jobs.BLOCK] = _attribute(frame, 0)
    if q[jobs.PIECES] > 1:
        _ask_for_help(job, frame, api[_COUNT_THREADS], api[_SCHEDULE])
    jobs.finish(job)
    return 0


def prepare(kind):
    """Compiles what a kind of product needs, and has the handler know of it.

    Args:
        kind: int, from `kernels.kind_of()`: the attribute of a call.

    Returns:
        int, the address of the handler.
    """
    _TABLE[0] = jobs.helping().address
    _TABLE[1 + kind] = kernels.kernel(kind).address
    return handler().address


@functools.cache
def handler():
    """What XLA calls, with an `address`."""
    return compiled(types.int64(types.int64), _handle)
