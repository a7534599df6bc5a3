"""The kernels of `step_kernels.py`, as operators of a captured step."""

from keras_nlp_cache.generate.loops import step_kernels
from keras_nlp_cache.generate.loops.torch_fusing import dtype_of
from keras_nlp_cache.kernels.floats import number_of
from keras_nlp_cache.kernels.kernel import bits
from keras_nlp_cache.kernels.torch_call import OPERATOR


def kernel_of(fused):
    """The kernel for some operators, see `torch_fusing.fuse()`.

    Args:
        fused: A `Fused`.

    Returns:
        A tuple of an operator and its arguments.
    """
    kernel, sizes = _KERNELS[fused.kind](fused, **fused.sizes)
    return OPERATOR, (
        fused.arguments,
        kernel.number,
        list(fused.last.meta["val"].shape),
        dtype_of(fused.last),
        list(sizes),
        1,
    )


def _number(node):
    return number_of(dtype_of(node))


def _normalize(fused, rows, width, epsilon):
    x, weight = fused.arguments
    return step_kernels.NORMALIZE, (
        rows,
        width,
        _number(x),
        bits(epsilon),
        0 if weight is None else _number(weight),
        _number(fused.last),
    )


def _rotate(fused, rows, width, heads, angles):
    dtype = _number(fused.last)
    return step_kernels.ROTATE, (rows, width, dtype, heads, angles)


def _gate(fused, rows, width):
    return step_kernels.GATE, (rows, width, _number(fused.last))


def _add(fused, rows, width, other_rows):
    return step_kernels.ADD, (rows, width, _number(fused.last), other_rows)


_KERNELS = {
    "normalize": _normalize,
    "rotate": _rotate,
    "gate": _gate,
    "add": _add,
}
