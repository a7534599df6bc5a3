"""Compiles functions for C to call, once for all processes."""

import contextlib
import threading

import numba

from keras_nlp_cache.files.cache_folder import cache_folder

_lock = threading.Lock()


def compiled(signature, function):
    """Compiles a function, or loads it if a process has compiled it before.

    What is compiled is kept in the user's cache folder, as converted models
    are, unless numba was told another one.

    Args:
        signature: Types of numba's.
        function: What it compiles.

    Returns:
        What has an `address`, for as long as it is kept.
    """
    with _lock, _keeping_in(cache_folder() / "kernels"):
        try:
            return numba.cfunc(signature, cache=True)(function)
        except RuntimeError as e:
            if "no locator available" not in str(e):
                raise
            # No folder can be written to.
            return numba.cfunc(signature)(function)


@contextlib.contextmanager
def _keeping_in(folder):
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before or str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
