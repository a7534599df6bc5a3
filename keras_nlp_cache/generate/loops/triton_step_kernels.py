"""Kernels for what a decode step does to a few thousand numbers, on a GPU.

In a recorded step nobody waits for Python, and yet each operator takes two
microseconds to begin, of which a step of a small model had 1,400. What PyTorch
rounds between two operators is rounded here.

Triton comes with PyTorch where there is a GPU for it.
https://triton-lang.org
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def kernel_of(fused):
    """The kernel for some operators, see `torch_fusing.fuse()`.

    Args:
        fused: A `Fused`.

    Returns:
        A tuple of a function, its arguments and its keyword arguments, or
        `None` for what is one operator anyway.
    """
    if fused.kind not in _FUNCTIONS:
        return None
    arguments = *fused.arguments, fused.last.meta["val"].dtype
    return _FUNCTIONS[fused.kind], arguments, fused.sizes


def normalize(x, weight, dtype, rows, width, epsilon):
    """`x` divided by the root of the mean of its squares.

    Args:
        x: Tensor `(..., width)`, of `rows` rows.
        weight: Optional tensor of `width` numbers, to multiply with.
        dtype: `torch.dtype` of what is returned.
        rows: int.
        width: int.
        epsilon: float. Is added to the mean.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _normalize[(rows,)](
        x.contiguous(),
        None if weight is None else weight.contiguous(),
        y,
        width,
        epsilon,
        block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return y


def rotate(x, cos, sin, dtype, rows, width, heads, angles):
    """`x * cos + turned(x) * sin`, where `turned(x)` swaps halves.

    Args:
        x: Tensor `(B, T, heads, width)`, of `rows` rows in all.
        cos: Tensor of `angles` rows, one for each token or for all.
        sin: Tensor like `cos`.
        dtype: `torch.dtype` of all of them, and of what is returned.
        rows: int.
        width: int.
        heads: int.
        angles: int.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _rotate[(rows,)](
        x.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        y,
        width,
        heads if angles > 1 else rows,
        block,
        num_warps=1,
        # A product and a sum in one would round once, not twice.
        enable_fp_fusion=False,
    )
    return y


def gate(x, gated, dtype, rows, width):
    """`silu(x) * gated`.

    Args:
        x: Tensor of `rows` rows of `width` numbers.
        gated: Tensor like `x`.
        dtype: `torch.dtype` of both, and of what is returned.
        rows: int.
        width: int.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    count = rows * width
    _gate[(triton.cdiv(count, _BLOCK),)](
        x.contiguous(), gated.contiguous(), y, count, _BLOCK
    )
    return y


_FUNCTIONS = {"normalize": normalize, "rotate": rotate, "gate": gate}


@triton.jit
def _normalize(x, weight, y, width, epsilon, block: tl.constexpr):
    first = tl.program_id(0) * width
    i = tl.arange(0, block)
    inside = i < width
    numbers = tl.load(x + first + i, inside, 0).to(tl.float32)
    mean = tl.sum(numbers * numbers) / width
    numbers = numbers * (1.0 / tl.sqrt(mean + epsilon))
    if weight is not None:
        numbers *= tl.load(weight + i, inside, 0).to(tl.float32)
    tl.store(y + first + i, numbers.to(y.dtype.element_ty), inside)


@triton.jit
def _rotate(x, cos, sin, y, width, rows_per_angle, block: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, block)
    inside = i < width
    half = width // 2
    other = tl.where(i < half, i + half, i - half)
    sign = tl.where(i < half, -1.0, 1.0)
    angle = row // rows_per_angle * width + i
    dtype = y.dtype.element_ty
    c = tl.load(cos + angle, inside, 0).to(tl.float32)
    s = tl.load(sin + angle, inside, 0).to(tl.float32)
    v = tl.load(x + row * width + i, inside, 0).to(tl.float32)
    w = tl.load(x + row * width + other, inside, 0).to(tl.float32) * sign
    first = (v * c).to(dtype).to(tl.float32)
    second = (w * s).to(dtype).to(tl.float32)
    tl.store(y + row * width + i, (first + second).to(dtype), inside)


@triton.jit
def _gate(x, gated, y, count, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    inside = i < count
    dtype = y.dtype.element_ty
    numbers = tl.load(x + i, inside, 0).to(tl.float32)
    numbers = numbers / (1.0 + tl.exp(-numbers))
    numbers = numbers.to(dtype).to(tl.float32)
    numbers *= tl.load(gated + i, inside, 0).to(tl.float32)
    tl.store(y + i, numbers.to(dtype), inside)
