"""What it takes to replay a graph that was built without a cache in mind.

A graph is run once more on new inputs while a `Wiring` is active, by which
decoder blocks find a cache of their own.
"""

import contextlib
import contextvars

_active = contextvars.ContextVar("keras_nlp_cache_wiring", default=None)


@contextlib.contextmanager
def replaying(wiring):
    """In this scope, blocks called on symbolic tensors get caches.

    Args:
        wiring: The `Wiring` that makes them, or `None` for them to get none.
    """
    token = _active.set(wiring)
    try:
        yield wiring
    finally:
        _active.reset(token)


def active_wiring():
    """The `Wiring` of the graph that is being replayed, or `None`."""
    return _active.get()
