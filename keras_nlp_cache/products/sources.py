"""The value of a variable outside of what is compiled: read, and followed."""

import weakref

import keras
import numpy as np


def source(variable):
    """How to follow a variable on this backend.

    Args:
        variable: A `keras.Variable`.

    Returns:
        An object with `changed()`, which says whether it was assigned to since
        the last call, or there was none, `array()`, its value as a NumPy array
        over the same memory, and `tensor()`, a tensor of a NumPy array.
    """
    return {
        "jax": _JaxSource,
        "tensorflow": _TensorFlowSource,
        "torch": _TorchSource,
    }[keras.config.backend()](variable)


class _JaxSource:
    """Arrays are never changed, so another value is another array."""

    def __init__(self, variable):
        self._variable = variable
        self._last = lambda: None

    def changed(self):
        value = self._variable.value
        if self._last() is value:
            return False
        self._last = weakref.ref(value)
        return True

    def array(self):
        return np.asarray(self._variable.value)

    @staticmethod
    def tensor(array):
        import jax

        return jax.device_put(array)


class _TorchSource:
    """Tensors are changed in place, and PyTorch counts how often."""

    def __init__(self, variable):
        self._variable = variable
        self._last = lambda: None
        self._version = None

    def changed(self):
        value = self._variable.value
        now = value._version, value.data_ptr()
        if self._last() is value and self._version == now:
            return False
        self._last, self._version = weakref.ref(value), now
        return True

    def array(self):
        import torch

        value = self._variable.value.detach()
        if value.dtype in (torch.bfloat16, torch.float16):
            value = value.view(torch.int16)
        return value.numpy()

    @staticmethod
    def tensor(array):
        import torch

        return torch.from_numpy(array)


class _TensorFlowSource:
    """Memory is written to by anybody, so that all of it is compared."""

    def __init__(self, variable):
        self._variable = variable
        self._sum = None

    def changed(self):
        from keras_nlp_cache.products.kernels import checksum

        now = checksum(self.array())
        if now == self._sum:
            return False
        self._sum = now
        return True

    def array(self):
        return np.asarray(self._variable.value)

    @staticmethod
    def tensor(array):
        import tensorflow as tf

        return tf.convert_to_tensor(array)
