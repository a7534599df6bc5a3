"""Compiles functions for C to call, once for all processes."""

import contextlib
import hashlib
import os
import sys
import threading
import types

import numba

from keras_nlp_cache.files.cache_folder import cache_folder

_lock = threading.Lock()


def compiled(signature, function):
    """Compiles a function, or loads it if a process has compiled it before.

    What is compiled is kept in the user's cache folder, as converted models
    are, unless numba was told another one. It is kept for the code that it was
    made of, where numba looks at one file and not at what that imports.

    Args:
        signature: Types of numba's.
        function: What it compiles.

    Returns:
        What has an `address`, for as long as it is kept.
    """
    folder = cache_folder() / "kernels" / _digest(function.__module__)
    with _lock, _keeping_in(folder):
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


def _digest(name):
    """What changes when a module does, or what it imports of this package."""
    package, _, _ = __name__.partition(".")
    files, left = {}, [name]
    while left:
        name = left.pop()
        if name in files or name.partition(".")[0] != package:
            continue
        module = sys.modules[name]
        state = os.stat(module.__file__)
        files[name] = state.st_mtime_ns, state.st_size
        for value in vars(module).values():
            if isinstance(value, types.ModuleType):
                left.append(value.__name__)
            else:
                left.append(str(getattr(value, "__module__", "")))
    text = repr(sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
