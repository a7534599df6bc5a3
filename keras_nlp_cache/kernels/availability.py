"""Whether kernels of our own run."""

import functools
import importlib.util
import sys

import keras


@functools.cache
def _why_not_here():
    """Why kernels of our own can't run in this process, `None` if they can."""
    if sys.platform == "win32":
        return "no threads of our own on Windows"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if keras.config.backend() not in ("jax", "tensorflow", "torch"):
        return f"the backend is {keras.config.backend()}"
    return None


def why_not():
    """Why kernels of our own do not run now, `None` if they do.

    They are for what is computed on one CPU.
    """
    reason = _why_not_here()
    if reason is not None:
        return reason
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        if jax.default_backend() != "cpu":
            return "JAX computes on another device"
    elif backend == "tensorflow":
        import tensorflow as tf

        from keras_nlp_cache.kernels import tensorflow_call

        if tf.config.list_logical_devices("GPU"):
            return "TensorFlow computes on a GPU"
        if not tensorflow_call.is_available():
            return "this TensorFlow takes no custom calls"
    else:
        from keras.src.backend.torch.core import get_device

        if get_device() != "cpu":
            return "PyTorch computes on another device"
    if keras.distribution.distribution() is not None:
        return "weights are distributed over devices"
    return None


def description():
    """Says what a decode step multiplies and attends with, in a few words.

    Returns:
        str.

    Example:
    ```python
    from keras_nlp_cache import kernels

    print(kernels.description())
    ```
    """
    reason = why_not()
    if reason is None:
        return "compiled by numba"
    return f"none but those of {keras.config.backend()} ({reason})"
