"""The values of variables outside of what is compiled: read, and followed."""

import weakref

import keras
import numpy as np


def reader(variables):
    """How to read variables on this backend.

    Args:
        variables: List of `keras.Variable`s.

    Returns:
        A function that returns their values, as tensors of the backend.
    """
    if keras.config.backend() == "torch":
        # What `value` asks of the scopes around it takes longer, of hundreds of
        # variables, than some of a step.
        return lambda: [x._value for x in variables]
    if keras.config.backend() == "jax":
        return lambda: [x.value for x in variables]
    import tensorflow as tf

    # One after the other, it takes milliseconds.
    return tf.function(
        lambda: [x.value.read_value() for x in variables], autograph=False
    )


def source():
    """How to follow a variable on this backend.

    Returns:
        An object with `changed(value)`, which says whether another value was
        assigned since the last call, or there was none, `array(value)`, its
        numbers in a NumPy array over the same memory, and `tensor(array)`,
        which makes a tensor of one.
    """
    return {
        "jax": _JaxSource,
        "tensorflow": _TensorFlowSource,
        "torch": _TorchSource,
    }[keras.config.backend()]()


class _JaxSource:
    """Arrays are never changed, so another value is another array."""

    def __init__(self):
        self._last = lambda: None

    def changed(self, value):
        if self._last() is value:
            return False
        self._last = weakref.ref(value)
        return True

    @staticmethod
    def array(value):
        return np.asarray(value)

    @staticmethod
    def tensor(array):
        import jax

        return jax.device_put(array)


class _TorchSource:
    """Tensors are changed in place, and PyTorch counts how often."""

    def __init__(self):
        self._last, self._version = lambda: None, None

    def changed(self, value):
        # In inference mode nobody counts, but nobody trains either.
        version = None if value.is_inference() else value._version
        if self._last() is value and self._version == version:
            return False
        self._last, self._version = weakref.ref(value), version
        return True

    @staticmethod
    def array(value):
        import torch

        value = value.detach()
        if value.dtype in (torch.bfloat16, torch.float16):
            value = value.view(torch.int16)
        return value.numpy()

    @staticmethod
    def tensor(array):
        import torch

        if array.dtype.name == "bfloat16":
            # Kernels read bits, whatever PyTorch takes them for.
            array = array.view(np.int16)
        return torch.from_numpy(array)


class _TensorFlowSource:
    """Memory is written to in place only while nobody else holds it.

    So it is held, and what is written then lies elsewhere. That is the memory
    of the variable itself, until it is written to and the next call sees it.
    A variable that was once assigned to in part, TensorFlow copies whenever it
    is read, and it counts as changed each time.
    """

    def __init__(self):
        self._held = None

    def changed(self, value):
        before, self._held = self._held, value
        return before is None or _place(before) != _place(value)

    @staticmethod
    def array(value):
        numbers = np.frombuffer(value, np.uint8).view(
            value.dtype.as_numpy_dtype
        )
        return numbers.reshape(value.shape)

    @staticmethod
    def tensor(array):
        import tensorflow as tf

        if array.dtype.name == "bfloat16":  # DLPack knows it, NumPy does not.
            return tf.convert_to_tensor(array)
        # Which would copy it twice.
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _place(tensor):
    """Where the numbers of a tensor lie."""
    return np.frombuffer(tensor, np.uint8).ctypes.data
