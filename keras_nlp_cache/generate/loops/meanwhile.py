"""Work for a second processor, while the first one waits for a compiler."""

import contextlib
import contextvars
import threading


@contextlib.contextmanager
def meanwhile(function):
    """Calls a function in a thread of its own, which ends with this scope.

    The function sees the context variables of who enters the scope.

    Args:
        function: Function without arguments.

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

    def run():
        try:
            context.run(function)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run, name="keras-nlp-cache-meanwhile")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]
