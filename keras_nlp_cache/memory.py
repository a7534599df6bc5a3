"""Arrays whose memory the backends take as it is, rather than copy."""

import math

import numpy as np

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
