"""A kernel as a custom call of XLA, in its stable foreign-function interface.

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

# What compiled code looks up: who helps, then kernels by their numbers.
_MOST_KERNELS = 31
_TABLE = np.zeros(1 + _MOST_KERNELS, np.int64)
_TABLE_SYMBOL = "keras_nlp_cache_kernels"
llvmlite.binding.add_symbol(_TABLE_SYMBOL, _TABLE.ctypes.data)
_table = symbol(_TABLE_SYMBOL)

# Places in `XLA_FFI_CallFrame`.
_FRAME = 21
_EXTENSION, _API, _CONTEXT, _ARGS, _RESULTS, _ATTRIBUTES = 1, 2, 3, 9, 14, 20
# In `XLA_FFI_Buffer`.
_BUFFER, _DATA = 6, 3
# In `XLA_FFI_Api`.
_API_WORDS, _VERSION, REGISTER, _SCHEDULE, _COUNT_THREADS = 19, 4, 9, 17, 18
# `XLA_FFI_Extension_Metadata`: asks which version the handler speaks.
_METADATA = 1


@numba.njit(inline="always")
def _attribute(frame, index):
    """The address of an attribute, which come in the order of their names."""
    return words(frame[_ATTRIBUTES], index + 1)[index]


@numba.njit(inline="always")
def _integer(attribute):
    """The value of an attribute: `XLA_FFI_Scalar`, a dtype and an address."""
    return words(words(attribute, 2)[1], 1)[0]


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
    """Runs a kernel.

    The attributes are `given`, of which a bit says for each argument that there
    is one, `number`, the kernel's, `pieces` and the array `sizes`.
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
    job = jobs.new_job(_integer(_attribute(frame, 2)))
    q = words(job, jobs.WORDS)
    number = _integer(_attribute(frame, 1))
    q[jobs.KERNEL] = words(_table(), 1 + _MOST_KERNELS)[1 + number]
    q[jobs.RESULT] = words(words(frame[_RESULTS], 1)[0], _BUFFER)[_DATA]
    given, at = _integer(_attribute(frame, 0)), 0
    for i in range(jobs.MOST_ARGUMENTS):
        q[jobs.ARGUMENTS + i] = 0
        if given >> i & 1:
            argument = words(frame[_ARGS], at + 1)[at]
            q[jobs.ARGUMENTS + i] = words(argument, _BUFFER)[_DATA]
            at += 1
    # `XLA_FFI_Array`: a dtype, a length and where it begins.
    array = words(_attribute(frame, 3), 3)
    sizes = words(array[2], array[1])
    for i in range(array[1]):
        q[jobs.SIZES + i] = sizes[i]
    if q[jobs.PIECES] > 1:
        _ask_for_help(job, frame, api[_COUNT_THREADS], api[_SCHEDULE])
    jobs.finish(job)
    return 0


def prepare(kernel):
    """Compiles a kernel, and has the handler know of it.

    Args:
        kernel: `Kernel`.

    Returns:
        int, the address of the handler.
    """
    _TABLE[0] = jobs.helping().address
    _TABLE[1 + kernel.number] = kernel.code.address
    return handler().address


def attributes(kernel, arguments, sizes, pieces):
    """The attributes of a call, ints and a tuple of ints, by their names.

    Args:
        kernel: `Kernel`.
        arguments: List of tensors and `None`s.
        sizes: Tuple of ints.
        pieces: int.
    """
    given = sum(1 << i for i, x in enumerate(arguments) if x is not None)
    return {
        "given": given,
        "number": kernel.number,
        "pieces": pieces,
        "sizes": sizes,
    }


@functools.cache
def handler():
    """What XLA calls, with an `address`."""
    return compiled(types.int64(types.int64), _handle)
