"""Arrays whose memory the backends take as it is, rather than copy."""

import math

import keras
import numpy as np
from keras import ops

# In bytes. What JAX and TensorFlow ask of memory that is not their own.
_ALIGNMENT = 64


def aligned(shape, dtype, new=np.empty):
    """A new array, of memory that JAX and TensorFlow need not copy.

    Args:
        shape: Tuple of ints.
        dtype: As NumPy takes it.
        new: `np.empty`, or `np.zeros`, whose memory is not touched before it is
            written to.

    Returns:
        An array.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = new(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def untouched_zeros(shape, dtype):
    """A tensor of zeros that no memory is read or written for, where it can be.

    The memory is the system's, which has it empty and gives it when it is
    touched. Frameworks would fill some of theirs, or copy this.

    Args:
        shape: Tuple of ints.
        dtype: str, as Keras takes it.

    Returns:
        A tensor, or an array that Keras makes one of.
    """
    if keras.backend.standardize_dtype(dtype) == "bfloat16":
        return ops.zeros(shape, dtype)
    x = aligned(shape, dtype, np.zeros)
    if keras.config.backend() == "jax":
        import jax

        return jax.device_put(x)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.experimental.dlpack.from_dlpack(x.__dlpack__())
    if keras.config.backend() == "torch":
        import torch

        return torch.from_numpy(x)
    return x
