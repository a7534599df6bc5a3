"""Compiles functions for C to call, once for all processes."""

import contextlib
import os
import pathlib
import threading

import numba
import platformdirs

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
    with _lock, _keeping_in(_folder()):
        try:
            return numba.cfunc(signature, cache=True)(function)
        except RuntimeError as e:
            if "no locator available" not in str(e):
                raise
            # No folder can be written to.
            return numba.cfunc(signature)(function)


def _folder():
    home = os.environ.get("KERAS_NLP_CACHE_HOME")
    home = home or platformdirs.user_cache_dir("keras-nlp-cache")
    return pathlib.Path(home) / "kernels"


@contextlib.contextmanager
def _keeping_in(folder):
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before or str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
