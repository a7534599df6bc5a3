"""Which form of a product runs, and what that was measured to be worth."""

import functools
import importlib.util
import sys

import keras

# Up to how many rows of `x` our kernels are the fastest form, by the dtype of
# what is read. Above, and without them, the forms of the backends serve.
#
# Microseconds for a weight of 768 x 3072 in the compiled step, as measured by
# `benchmarks/products.py` on 2 cores; in brackets, those of the backend.
MOST_ROWS = {
    "float32": 32,
    "bfloat16": 32,
    "float16": 32,
    "int8": 32,
    "int4": 32,
}

# Of smaller weights, a call costs more than what is saved.
LEAST_NUMBERS = 4096


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

        from keras_nlp_cache.products import tensorflow_product

        if tf.config.list_logical_devices("GPU"):
            return "TensorFlow computes on a GPU"
        if not tensorflow_product.is_available():
            return "this TensorFlow takes no custom calls"
    else:
        from keras.src.backend.torch.core import get_device

        if get_device() != "cpu":
            return "PyTorch computes on another device"
    if keras.distribution.distribution() is not None:
        return "weights are distributed over devices"
    return None


def is_worth(rows, dtype, numbers):
    """Whether to multiply with a kernel of our own.

    Args:
        rows: int. How many rows of `x` there are.
        dtype: str. What is read, a key of `MOST_ROWS`.
        numbers: int. How many the weight has.
    """
    return rows <= MOST_ROWS[dtype] and numbers >= LEAST_NUMBERS


def description():
    """Says which form the products of a decode step have, in a few words.

    Returns:
        str.

    Example:
    ```python
    from keras_nlp_cache import products

    print(products.description())
    ```
    """
    reason = why_not()
    if reason is None:
        return "kernels compiled by numba"
    return f"those of {keras.config.backend()} ({reason})"
