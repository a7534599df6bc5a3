"""Rotary positions, for layers of upstream's that cannot be told where to be.

Reference:
    https://arxiv.org/abs/2104.09864
"""

from keras import ops


def rotated(x, positions, frequency, scale=1.0):
    """Rotates halves of queries or keys against each other.

    Args:
        x: Tensor `(B, T, heads, head_dim)`.
        positions: int32 tensor `(B or 1, T)`.
        frequency: float32 tensor `(head_dim / 2,)`. Radians per position.
        scale: float. Multiplies the result.

    Returns:
        A tensor like `x`.
    """
    angle = ops.cast(positions, "float32")[:, :, None] * frequency
    return turned(x, angle, scale)


def turned(x, angle, scale=1.0):
    """Rotates halves of queries or keys against each other by some angles.

    Args:
        x: Tensor `(B, T, heads, head_dim)`.
        angle: float32 tensor `(B or 1, T, head_dim / 2)`, in radians.
        scale: float. Multiplies the result.

    Returns:
        A tensor like `x`.
    """
    angle = angle[:, :, None]
    cosine = ops.cast(ops.cos(angle) * scale, x.dtype)
    sine = ops.cast(ops.sin(angle) * scale, x.dtype)
    one, other = ops.split(x, 2, axis=-1)
    return ops.concatenate(
        (one * cosine - other * sine, other * cosine + one * sine), axis=-1
    )
