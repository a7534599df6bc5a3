"""Keys or values in eight bits each."""

import typing

from keras import ops

_LARGEST = 127.0


class Int8(typing.NamedTuple):
    """Numbers in eight bits, with a scale for each token and head.

    Of 64 numbers, it takes 68 bytes where float32 takes 256. What it stands for
    is off by at most 1/254 of the largest number of the token and head.

    Args:
        values: int8 tensor `(B, heads, S, head_dim)`.
        scale: float32 tensor `(B, heads, S, 1)`, to multiply them by.
    """

    values: typing.Any
    scale: typing.Any

    @classmethod
    def of(cls, x):
        """Rounds a floating tensor `(B, heads, S, head_dim)`."""
        x = ops.cast(x, "float32")
        scale = ops.max(ops.abs(x), axis=-1, keepdims=True) / _LARGEST
        # Of zeros, any scale is right but one that divides by nothing.
        scale = ops.where(scale == 0, ops.ones_like(scale), scale)
        return cls(ops.cast(ops.round(x / scale), "int8"), scale)

    @property
    def shape(self):
        return self.values.shape

    def widened(self, dtype):
        """The numbers it stands for, as a tensor."""
        return ops.cast(ops.cast(self.values, "float32") * self.scale, dtype)


def widened(x, dtype):
    """Keys or values as a tensor, of some dtype if they are no tensor yet."""
    return x.widened(dtype) if isinstance(x, Int8) else x
