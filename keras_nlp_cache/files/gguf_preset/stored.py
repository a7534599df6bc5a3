"""Tensors as GGUF files store them, in groups of 32 numbers with a scale.

A row of a matrix is a row of bytes, one group after the other: its scale, in
`Q4_1` then its smallest number, and its numbers, of four bits those of the
first half of the group with those of the second in one byte each.
"""

import typing

import numpy as np

# How many numbers share a scale.
GROUP = 32
# What can be taken apart, by its name in GGUF.
FORMATS = ("Q8_0", "Q4_0", "Q4_1")
# Bytes of a group.
_SIZES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


class Groups(typing.NamedTuple):
    """A matrix taken apart, `scale * numbers`, and `smallest` added.

    Attributes:
        numbers: int8 array `(N, K)`. Of four bits, from 0 to 15 for `Q4_1` and
            from -8 to 7 for `Q4_0`.
        scale: float16 array `(N, K / 32)`.
        smallest: float16 array `(N, K / 32)`, or `None` if it is 0.
    """

    numbers: np.ndarray
    scale: np.ndarray
    smallest: np.ndarray | None


def take_apart(rows, kind):
    """Takes a matrix apart.

    Args:
        rows: uint8 array, for each row of the matrix its bytes in the file.
        kind: str, one of `FORMATS`.

    Returns:
        `Groups`.
    """
    head = 4 if kind == "Q4_1" else 2
    groups = rows.reshape(rows.shape[0], -1, _SIZES[kind])
    told = np.ascontiguousarray(groups[..., :head]).view(np.float16)
    numbers = groups[..., head:]
    if kind == "Q8_0":
        numbers = np.ascontiguousarray(numbers).view(np.int8)
    else:
        numbers = np.concatenate([numbers & 15, numbers >> 4], axis=-1)
        numbers = numbers.view(np.int8)
        if kind == "Q4_0":
            numbers -= 8
    return Groups(
        numbers.reshape(rows.shape[0], -1),
        told[..., 0],
        told[..., 1] if kind == "Q4_1" else None,
    )


def depth(size, kind):
    """How many numbers a row of so many bytes has."""
    return size // _SIZES[kind] * GROUP


def widened(data, kind):
    """The numbers of a tensor.

    Args:
        data: Array, as `gguf.GGUFReader` has it.
        kind: str, any format that the package `gguf` knows.

    Returns:
        A float32 array.

    Raises:
        NotImplementedError: If `gguf` cannot read the format.
    """
    import gguf

    return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
