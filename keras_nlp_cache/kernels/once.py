"""What is done once, whichever thread asks for it first."""

import functools
import threading


def once(function):
    """Has a function be called once for arguments, and by one thread.

    A step may be compiled in one thread while a prompt is read in another.
    `functools.cache` alone lets both call, and XLA takes no name twice.

    Args:
        function: Function of hashable arguments.

    Returns:
        A function that returns what the first call did.
    """
    lock, cached = threading.RLock(), functools.cache(function)

    @functools.wraps(function)
    def call(*args):
        with lock:
            return cached(*args)

    return call
