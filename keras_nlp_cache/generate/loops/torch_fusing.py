"""What a captured step does in several operators, in one kernel.

Upstream's layers normalize in five operators and rotate in nine, and to call an
operator takes PyTorch longer than it takes to compute so few numbers. They are
found by what they compute, whichever layer they are of.
"""

import math
import operator

import torch

from keras_nlp_cache.generate.loops.step_kernels import NORMALIZE
from keras_nlp_cache.generate.loops.step_kernels import ROTATE
from keras_nlp_cache.kernels.kernel import bits
from keras_nlp_cache.kernels.torch_call import OPERATOR

_aten = torch.ops.aten


def fuse(module):
    """Replaces operators of a captured function by kernels.

    Args:
        module: `torch.fx.GraphModule`, changed in place.
    """
    graph = module.graph
    for node in graph.nodes:
        for find in (_normalized, _rotated):
            arguments = find(module, node)
            if arguments is None:
                continue
            with graph.inserting_before(node):
                fused = graph.call_function(OPERATOR, arguments)
            fused.meta = node.meta
            node.replace_all_uses_with(fused)
            break
    graph.eliminate_dead_code()
    module.recompile()


def _normalized(module, node):
    """The arguments of a kernel for `x * rsqrt(mean(x ** 2) + epsilon)`."""
    for x, root in _either_way(node, _aten.mul.Tensor):
        total = _argument_of(root, _aten.rsqrt.default)
        if not _is_call(total, _aten.add.Tensor):
            continue
        mean, epsilon = total.args
        if not isinstance(epsilon, float):
            continue
        if not _is_call(mean, _aten.mean.dim) or mean.args[1:] != ([-1], True):
            continue
        if not _is_square(module, mean.args[0], x) or not _is_plain(x, node):
            continue
        shape = tuple(node.meta["val"].shape)
        sizes = math.prod(shape[:-1]), shape[-1], bits(epsilon)
        return [x], NORMALIZE.number, shape, sizes, 1
    return None


def _is_square(module, node, x):
    if _is_call(node, _aten.pow.Tensor_Scalar):
        return node.args == (x, 2)
    if not _is_call(node, _aten.pow.Tensor_Tensor) or node.args[0] is not x:
        return False
    exponent = node.args[1]
    if exponent.op != "get_attr":
        return False
    value = operator.attrgetter(exponent.target)(module)
    return value.numel() == 1 and value.item() == 2


def _rotated(module, node):
    """The arguments of a kernel for `x * cos + turned(x) * sin`.

    The halves of `turned(x)` are the second half of `x`, negative, and the
    first.
    """
    for first, second in _either_way(node, _aten.add.Tensor):
        for x, cos in _either_way(first, _aten.mul.Tensor):
            for turned, sin in _either_way(second, _aten.mul.Tensor):
                if _is_turned(turned, x) and _is_plain(x, node):
                    sizes = _sizes_of_rotation(x, cos, sin)
                    if sizes is not None:
                        shape = tuple(node.meta["val"].shape)
                        number = ROTATE.number
                        return [x, cos, sin], number, shape, sizes, 1
    return None


def _is_turned(node, x):
    stacked = _argument_of(node, _aten.view.default)
    if not _is_call(stacked, _aten.stack.default):
        return False
    if stacked.args[1:] != (-2,) or len(stacked.args[0]) != 2:
        return False
    negative, first = stacked.args[0]
    second = _argument_of(negative, _aten.neg.default)
    if not _is_call(first, operator.getitem) or first.args[1] != 0:
        return False
    if not _is_call(second, operator.getitem) or second.args[1] != 1:
        return False
    halves = first.args[0]
    half = x.meta["val"].shape[-1] // 2
    return (
        second.args[0] is halves
        and _is_call(halves, _aten.split.Tensor)
        and halves.args == (x, half, -1)
        and x.meta["val"].shape[-1] == 2 * half
        and node.meta["val"].shape == x.meta["val"].shape
    )


def _sizes_of_rotation(x, cos, sin):
    """The sizes of a kernel that rotates `(B, T, heads, head_dim)`."""
    shape = tuple(x.meta["val"].shape)
    if len(shape) != 4:
        return None
    rows, length, heads, width = shape
    angles = tuple(cos.meta["val"].shape)
    for part in (cos, sin):
        if tuple(part.meta["val"].shape) != angles or not _is_float(part):
            return None
    if angles not in ((rows, length, 1, width), (1, 1, 1, width)):
        return None
    return math.prod(shape[:-1]), width, heads, angles[0] * angles[1]


def _either_way(node, target):
    """The arguments of an operator of two tensors, in both orders."""
    if not _is_call(node, target) or node.kwargs:
        return ()
    if not all(isinstance(x, torch.fx.Node) for x in node.args):
        return ()
    first, second = node.args
    return (first, second), (second, first)


def _argument_of(node, target):
    """What an operator of this kind is called on, `None` for others."""
    return node.args[0] if _is_call(node, target) else None


def _is_call(node, target):
    return isinstance(node, torch.fx.Node) and node.target is target


def _is_plain(x, node):
    """Whether a kernel can read a tensor, and return one of another node."""
    return (
        _is_float(x)
        and _is_float(node)
        and x.meta["val"].shape == node.meta["val"].shape
    )


def _is_float(node):
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
