"""Work for a second processor, while the first one waits for a compiler."""

import contextlib
import contextvars
import threading

_waiting = contextvars.ContextVar("_waiting", default=None)


@contextlib.contextmanager
def meanwhile(function, waits=False):
    """Calls a function in a thread of its own, which ends with this scope.

    The function sees the context variables of who enters the scope.

    Args:
        function: Function without arguments.
        waits: bool. Call it when the scope calls `proceed()`, or ends.

    Raises:
        Exception: What the function raised, unless the scope did itself.

    Example:
    ```python
    with meanwhile(compile_the_next):
        run_this_one()
    ```
    """
    errors = []
    context = contextvars.copy_context()
    begin = threading.Event()

    def run():
        begin.wait()
        try:
            context.run(function)
        except BaseException as e:
            errors.append(e)

    if not waits:
        begin.set()
    thread = threading.Thread(target=run, name="keras-nlp-cache-meanwhile")
    thread.start()
    token = _waiting.set(begin)
    try:
        yield
    finally:
        _waiting.reset(token)
        begin.set()
        thread.join()
    if errors:
        raise errors[0]


def is_waiting():
    """Whether a function of a scope around this one waits for `proceed()`."""
    begin = _waiting.get()
    return begin is not None and not begin.is_set()


def proceed():
    """Has the function be called that waits, if there is one."""
    if is_waiting():
        _waiting.get().set()
