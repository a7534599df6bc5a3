"""PyTorch's threads, kept from the cores that kernels run on.

When PyTorch has divided an operator among threads, they wait for the next one
by spinning, and kernels that follow share a core with each of them: a step of
SmolLM2 took 26 milliseconds in place of 15, for the sampler divides two small
operators.
"""

import contextlib
import contextvars
import ctypes
import functools

import torch

_threads = contextvars.ContextVar("keras_nlp_cache_threads", default=None)


@contextlib.contextmanager
def one_thread():
    """In this scope, PyTorch's operators run on one thread, kernels on all.

    For this thread alone: `torch.set_num_threads()` would be for those as well
    that begin in the meantime.
    """
    count = torch.get_num_threads()
    set_count = _set_count()
    if set_count is None or count == 1:
        yield
        return
    set_count(1)
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)
        set_count(count)


@contextlib.contextmanager
def all_threads():
    """In this scope, PyTorch's operators run on all threads again."""
    count = _threads.get()
    if count is None:
        yield
        return
    _set_count()(count)
    try:
        yield
    finally:
        _set_count()(1)


def thread_count():
    """On how many threads kernels run."""
    return _threads.get() or torch.get_num_threads()


@functools.cache
def _set_count():
    """OpenMP's function for this thread, `None` if PyTorch has another one."""
    set_count = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_count is None:
        return None
    before = torch.get_num_threads()
    set_count(before + 1)
    is_heard = torch.get_num_threads() == before + 1
    set_count(before)
    return set_count if is_heard else None
