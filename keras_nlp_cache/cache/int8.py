"""Keys or values in eight bits each."""

import functools
import typing

import numpy as np
from keras import ops

_LARGEST = 127.0


class Int8(typing.NamedTuple):
    """Numbers in eight bits, with a scale for each token and head.

    Of 64 numbers, it takes 68 bytes where float32 takes 256.

    Some of a head's numbers are often much larger than the others, and would
    leave these few of the 255 steps. So it keeps them in another basis, in
    which all are about as large. A query in that basis has the same products
    with keys, and averages of values in it are turned back: `turn()` and
    `turn_back()`.

    Args:
        values: int8 tensor `(B, heads, S, head_dim)`.
        scale: float32 tensor `(B, heads, S, 1)`, to multiply them by.

    Reference:
        Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456, who turn by
        Hadamard matrices. Cosines are there for heads of any size.
    """

    values: typing.Any
    scale: typing.Any

    @classmethod
    def of(cls, x):
        """Rounds a floating tensor `(B, heads, S, head_dim)`."""
        x = turn(ops.cast(x, "float32"))
        scale = ops.max(ops.abs(x), axis=-1, keepdims=True) / _LARGEST
        # Of zeros, any scale is right but one that divides by nothing.
        scale = ops.where(scale == 0, ops.ones_like(scale), scale)
        return cls(ops.cast(ops.round(x / scale), "int8"), scale)

    @property
    def shape(self):
        return self.values.shape

    def widened(self, dtype):
        """The numbers it stands for, as a tensor."""
        x = ops.cast(self.values, "float32") * self.scale
        return ops.cast(turn_back(x), dtype)


def turn(x):
    """Queries, keys or values `(..., head_dim)` in the basis of an `Int8`."""
    return ops.matmul(x, ops.convert_to_tensor(_basis(x.shape[-1]).T, x.dtype))


def turn_back(x):
    """Undoes `turn()`."""
    return ops.matmul(x, ops.convert_to_tensor(_basis(x.shape[-1]), x.dtype))


@functools.cache
def _basis(size):
    """The discrete cosine transform, an orthogonal matrix."""
    frequency, place = np.arange(size)[:, None], np.arange(size) + 0.5
    cosines = np.sqrt(2 / size) * np.cos(np.pi / size * frequency * place)
    cosines[0] /= np.sqrt(2)
    return cosines.astype("float32")


def widened(x, dtype):
    """Keys or values as a tensor, of some dtype if they are no tensor yet."""
    return x.widened(dtype) if isinstance(x, Int8) else x
