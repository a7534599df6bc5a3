"""Scopes in which Python looks for less garbage, since there is little.

Python looks for garbage among all objects that it has, as soon as there are
some more. Frameworks and a model are a million, and while a program is traced
many are made that stay: of 8 s until the first token on PyTorch, 1.7 went into
that, and found nothing.
"""

import contextlib
import gc


@contextlib.contextmanager
def collecting_none():
    """In this scope, no garbage is collected, in any thread."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def collecting_new():
    """In this scope, only what is made in it is looked at."""
    if gc.get_freeze_count():
        yield  # Somebody else has seen to it, and counts on it.
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_all():
    """Has all that there is stay, and not be looked at any more.

    For programs, once what they work with is loaded.
    """
    gc.freeze()
