"""Compiles functions for C to call, once for all processes."""

import contextlib
import functools
import hashlib
import pathlib
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
    made of, wherever that is installed, where numba looks at one file, at its
    place and not at what it imports.

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
    """Has numba keep what it compiles, if it was not told where."""
    config = numba.config
    if config.CACHE_DIR:
        yield
        return
    # Older versions know of none, and look for the path of a file, too.
    locators = getattr(config, "CACHE_LOCATOR_CLASSES", "")
    config.CACHE_DIR = str(folder)
    config.CACHE_LOCATOR_CLASSES = (
        "keras_nlp_cache.kernels.anywhere.AnywhereLocator"
    )
    try:
        yield
    finally:
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = "", locators


def _digest(name):
    """What changes when a module does, or what it imports of this package."""
    package, _, _ = __name__.partition(".")
    files, left = {}, [name]
    while left:
        name = left.pop()
        if name in files or name.partition(".")[0] != package:
            continue
        module = sys.modules[name]
        files[name] = _content(module.__file__)
        for value in vars(module).values():
            if isinstance(value, types.ModuleType):
                left.append(value.__name__)
            else:
                left.append(str(getattr(value, "__module__", "")))
    text = repr(sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _content(path):
    """What stands for the content of a file, as it was imported."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
