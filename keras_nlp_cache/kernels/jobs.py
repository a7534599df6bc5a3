"""A product as a job that threads share, who take its pieces one by one.

Nobody is given a part: whoever is free takes the next piece. So a thread that
the system lets wait, as beside another busy process, delays no more than the
piece that it has begun, and one that comes too late finds nothing to do.

A job is a block of memory. All who may still look at it are counted, and the
last one gives it back.
"""

import functools

import numba
from numba import types

from keras_nlp_cache.kernels.compiling import compiled
from keras_nlp_cache.kernels.machine_words import allocate
from keras_nlp_cache.kernels.machine_words import call_with_two
from keras_nlp_cache.kernels.machine_words import fetch_add
from keras_nlp_cache.kernels.machine_words import release
from keras_nlp_cache.kernels.machine_words import words

NEXT = 0  # The piece that is taken next.
DONE = 1  # How many pieces are computed.
USERS = 2
PIECES = 3
KERNEL = 4  # Addresses, from here on to `SIZES`.
RESULT = 5
ARGUMENTS = 6
SIZES = 14
WORDS = 30
MOST_ARGUMENTS = SIZES - ARGUMENTS
MOST_SIZES = WORDS - SIZES

let_others_run = types.ExternalFunction("sched_yield", types.int32())


@numba.njit
def new_job(pieces):
    """Allocates a job of some pieces.

    Returns:
        Its address. What is to be set are the addresses, 0 for arguments that
        there are none of, and sizes.
    """
    job = allocate(8 * WORDS)
    q = words(job, WORDS)
    q[NEXT] = 0
    q[DONE] = 0
    q[USERS] = 1
    q[PIECES] = pieces
    return job


@numba.njit
def work(job):
    """Computes pieces for as long as there are any."""
    q = words(job, WORDS)
    pieces = q[PIECES]
    piece = fetch_add(job + 8 * NEXT, 1)
    while piece < pieces:
        call_with_two(q[KERNEL], job, piece)
        fetch_add(job + 8 * DONE, 1)
        piece = fetch_add(job + 8 * NEXT, 1)


@numba.njit
def leave(job):
    """Says that the caller does not look at a job any more."""
    if fetch_add(job + 8 * USERS, -1) == 1:
        release(job)


@numba.njit
def finish(job):
    """Computes what is left, waits for what others have begun, and leaves."""
    work(job)
    pieces, spins = words(job, WORDS)[PIECES], 0
    while fetch_add(job + 8 * DONE, 0) < pieces:
        spins += 1
        if spins > 1000:
            # Whoever has it waits for a core, perhaps for this one.
            let_others_run()
    leave(job)


def _help_with(job):
    work(job)
    leave(job)


@functools.cache
def helping():
    """What a thread does that was asked to help, with an `address`."""
    return compiled(types.void(types.int64), _help_with)
