"""Kernels on PyTorch, as one operator.

A captured step has it as a whole, and Inductor leaves it as it is.
"""

import functools

import numpy as np
import torch
from numba import types

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.compiling import compiled
from keras_nlp_cache.kernels.kernel import KERNELS
from keras_nlp_cache.kernels.machine_words import words
from keras_nlp_cache.kernels.own_threads import ask_for_help
from keras_nlp_cache.kernels.own_threads import helpers_state
from keras_nlp_cache.kernels.torch_threads import thread_count

_LIBRARY = torch.library.Library("keras_nlp_cache", "FRAGMENT")
_LIBRARY.define(
    "kernel(Tensor?[] arguments, int number, int[] shape, str dtype, "
    "int[] sizes, int pieces) -> Tensor"
)


def call(kernel, arguments, shape, dtype, sizes, pieces):
    """What `Kernel` does on PyTorch, by one operator."""
    return torch.ops.keras_nlp_cache.kernel(
        arguments, kernel.number, shape, dtype, sizes, pieces
    )


def kernel(arguments, number, shape, dtype, sizes, pieces):
    """What the operator does."""
    # Copies stay until the kernel has read them.
    arguments = [x if x is None else x.contiguous() for x in arguments]
    y = torch.empty(shape, dtype=getattr(torch, dtype))
    run(np.array([job(arguments, number, y, sizes, pieces)]))
    return y


_LIBRARY.impl("kernel", kernel, "CompositeExplicitAutograd")
# What a captured function calls.
OPERATOR = torch.ops.keras_nlp_cache.kernel.default


@torch.library.register_fake("keras_nlp_cache::kernel", lib=_LIBRARY)
def _(arguments, number, shape, dtype, sizes, pieces):
    (first, *_) = arguments
    return first.new_empty(shape, dtype=getattr(torch, dtype))


def job(arguments, number, result, sizes, pieces):
    """A call of a kernel, to be run any number of times.

    Args:
        arguments: List of contiguous tensors, and `None`s.
        number: int, the kernel's.
        result: Contiguous tensor. It is written to.
        sizes: Sequence of ints.
        pieces: int.

    Returns:
        int64 array. It has the addresses of tensors, and does not keep them.
    """
    q = np.zeros(jobs.WORDS, np.int64)
    q[jobs.PIECES] = pieces
    q[jobs.KERNEL] = KERNELS[number].code.address
    q[jobs.RESULT] = result.data_ptr()
    for i, x in enumerate(arguments):
        q[jobs.ARGUMENTS + i] = 0 if x is None else x.data_ptr()
    q[jobs.SIZES : jobs.SIZES + len(sizes)] = sizes
    return q


def run(calls):
    """Runs kernels one after the other, each on all threads.

    Args:
        calls: int64 array, rows from `job()`.
    """
    _compiled_run().ctypes(
        calls.ctypes.data,
        len(calls),
        helpers_state(),
        thread_count() - 1,
    )


def _run_jobs(calls, count, state, most_helpers):
    for i in range(count):
        call = words(calls + 8 * jobs.WORDS * i, jobs.WORDS)
        pieces = call[jobs.PIECES]
        job = jobs.new_job(pieces)
        q = words(job, jobs.WORDS)
        for j in range(jobs.KERNEL, jobs.WORDS):
            q[j] = call[j]
        helpers = min(most_helpers, pieces - 1)
        if state != 0 and helpers > 0:
            ask_for_help(state, job, helpers)
        jobs.finish(job)


@functools.cache
def _compiled_run():
    """`_run_jobs()`, to be called with integers, without Python's lock."""
    return compiled(types.void(*[types.int64] * 4), _run_jobs)
