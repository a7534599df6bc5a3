"""Threads of our own that help with jobs, where no runtime lends any.

PyTorch's threads wait by spinning, and each operator waits for all of them: a
thread that another process keeps from its core holds up every one. These let
others run while they look for something to do, sleep if there is nothing for
longer than it takes to be woken, and nobody waits for one that does not come.
"""

import functools
import os
import threading

import numba
import numpy as np
from numba import types

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.compiling import compiled
from keras_nlp_cache.kernels.machine_words import fetch_add
from keras_nlp_cache.kernels.machine_words import read_now
from keras_nlp_cache.kernels.machine_words import swap
from keras_nlp_cache.kernels.machine_words import words

# What threads share: a semaphore of the C library, which needs 32 bytes, a
# lock, how many sleep, and a ring of jobs from the oldest one to the newest.
_SEMAPHORE, _LOCK, _SLEEPERS, _OLDEST, _NEWEST, _RING = 0, 8, 9, 10, 11, 12
_PLACES = 64
# How often a thread looks for a job before it sleeps: about 100 microseconds.
# To wake it takes 20, and a step has jobs of 10.
_LOOKS = 250

_initialize = types.ExternalFunction(
    "sem_init", types.int32(types.int64, types.int32, types.uint32)
)
_post = types.ExternalFunction("sem_post", types.int32(types.int64))
_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))


@numba.njit
def _lock(state):
    while swap(state + 8 * _LOCK, 1) != 0:
        jobs.let_others_run()


@numba.njit
def _unlock(state):
    swap(state + 8 * _LOCK, 0)


@numba.njit
def ask_for_help(state, job, helpers):
    """Has threads come that help with a job.

    Args:
        state: int, from `helpers_state()`.
        job: From `jobs.new_job()`.
        helpers: int. How many at most.
    """
    shared = words(state, _RING + _PLACES)
    _lock(state)
    free = _PLACES - (shared[_NEWEST] - shared[_OLDEST])
    helpers = min(helpers, free)
    words(job, jobs.WORDS)[jobs.USERS] = 1 + helpers
    for _ in range(helpers):
        shared[_RING + shared[_NEWEST] % _PLACES] = job
        shared[_NEWEST] += 1
    _unlock(state)
    sleepers = read_now(state + 8 * _SLEEPERS)
    for _ in range(min(helpers, sleepers)):
        _post(state + 8 * _SEMAPHORE)


@numba.njit
def _next_job(state):
    """Takes a job, 0 if there is none."""
    if read_now(state + 8 * _OLDEST) == read_now(state + 8 * _NEWEST):
        return 0
    shared = words(state, _RING + _PLACES)
    job = 0
    _lock(state)
    if shared[_OLDEST] < shared[_NEWEST]:
        job = shared[_RING + shared[_OLDEST] % _PLACES]
        shared[_OLDEST] += 1
    _unlock(state)
    return job


def _begin(state):
    return _initialize(state + 8 * _SEMAPHORE, 0, 0)


def _serve(state):
    looks = 0
    while True:
        job = _next_job(state)
        if job != 0:
            jobs.work(job)
            jobs.leave(job)
            looks = 0
        elif looks < _LOOKS:
            looks += 1
            jobs.let_others_run()
        else:
            # Who asks for help after this wakes somebody, and what was asked
            # for before is seen now.
            fetch_add(state + 8 * _SLEEPERS, 1)
            if read_now(state + 8 * _OLDEST) == read_now(state + 8 * _NEWEST):
                _wait(state + 8 * _SEMAPHORE)
            fetch_add(state + 8 * _SLEEPERS, -1)
            looks = 0


@functools.cache
def helpers_state():
    """Starts threads that help, once in a process.

    Returns:
        int, the address of what they share. 0 if there are none, for there is
        one core, or a system without such semaphores.
    """
    count = (os.cpu_count() or 1) - 1
    if count < 1:
        return 0
    memory = np.zeros(_RING + _PLACES, np.int64)
    state = memory.ctypes.data
    begin = compiled(types.int32(types.int64), _begin)
    if begin.ctypes(state) != 0:
        return 0
    serve = compiled(types.void(types.int64), _serve)
    for _ in range(count):
        # What is called from C has no lock of Python's, and never returns.
        threading.Thread(
            target=_Serving(serve, memory),
            name="keras_nlp_cache_kernels",
            daemon=True,
        ).start()
    return state


class _Serving:
    """Keeps what a thread uses for as long as it may use it: always."""

    def __init__(self, serve, memory):
        self._serve = serve
        self._memory = memory

    def __call__(self):
        self._serve.ctypes(self._memory.ctypes.data)


# In a process that was forked there are no threads but one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers_state.cache_clear)
