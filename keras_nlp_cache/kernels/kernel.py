"""What a kernel is, and how layers call one."""

import functools
import math
import struct
import typing

import keras
from numba import types

from keras_nlp_cache.device import constants
from keras_nlp_cache.kernels.compiling import compiled

_PIECE = types.void(types.int64, types.int64)

# All kernels by their numbers.
KERNELS = {}


class Kernel:
    """Code that computes pieces of a job, in what a backend compiles.

    Args:
        number: int. Its own. Compiled programs call it by its number, also
            those that are kept on disk.
        piece: Function `(job, piece)` of two int64 that computes a piece of a
            job, see `jobs.py`. It needs a name of its own: code that is loaded
            from disk finds what it calls by name.
    """

    def __init__(self, number, piece):
        if number in KERNELS:
            raise ValueError(
                f"Expected a number that no kernel has. Received: {number}, "
                f"that of {KERNELS[number].piece.__name__!r}."
            )
        self.number, self.piece = number, piece
        KERNELS[number] = self

    @functools.cached_property
    def code(self):
        """What was compiled, with an `address`."""
        return compiled(_PIECE, self.piece)

    def __call__(self, arguments, shape, dtype, sizes, pieces):
        """Has the kernel compute a tensor.

        To be called in what is compiled, or captured: there are no gradients.

        Args:
            arguments: List of tensors, `None` for those that the kernel is to
                do without. It reads them in the order of their axes.
            shape: Tuple of ints, of the result.
            dtype: str. That of the result.
            sizes: Tuple of ints, what else the kernel is to know.
            pieces: int. Into how many pieces to divide the job.

        Returns:
            A tensor.
        """
        return _backend_call()(self, arguments, shape, dtype, sizes, pieces)


def pieces_of(bytes_read, most=None):
    """Into how many pieces it is worth to divide a job.

    Args:
        bytes_read: int. How much it reads, at the speed of memory.
        most: Optional int. Into how many it can be divided.
    """
    known = constants()
    most = known.most_pieces if most is None else min(most, known.most_pieces)
    return max(1, min(most, bytes_read // known.piece_bytes))


def bits(x):
    """The bits of a float64 as an int, to pass it as a size."""
    return struct.unpack("<q", struct.pack("<d", float(x)))[0]


def tensor_bytes(x):
    """How many bytes a tensor takes."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return math.prod(x.shape) * _BYTES[dtype]


_BYTES: typing.Final = {
    "int8": 1,
    "uint8": 1,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "float32": 4,
}


def _backend_call():
    backend = keras.config.backend()
    if backend == "jax":
        from keras_nlp_cache.kernels.jax_call import call
    elif backend == "tensorflow":
        from keras_nlp_cache.kernels.tensorflow_call import call
    else:
        from keras_nlp_cache.kernels.torch_call import call
    return call
