"""What a captured step does in several operators, in one kernel.

Upstream's layers normalize in six operators, or eight of numbers of 16 bits,
and rotate in nine, and to call an operator takes PyTorch longer than it takes
to compute so few numbers, as it takes a GPU longer to begin with each. They are
found by what they compute, whichever layer they are of. What computes it there
stands in `torch_step_kernels.py` for a CPU, in `triton_step_kernels.py` for a
GPU.
"""

import math
import operator
import typing

import torch

_aten = torch.ops.aten
# What kernels read and write.
_FLOATS = ("float32", "bfloat16", "float16")


class Fused(typing.NamedTuple):
    """Operators that one kernel stands for.

    Attributes:
        last: The node of the last one, whose place the kernel takes.
        kind: str, what they compute together: `"normalize"`, `"rotate"`,
            `"gate"` or `"add"`.
        arguments: List of nodes, `None` for what is not there.
        sizes: Dictionary of numbers that the kernel is to know.
    """

    last: torch.fx.Node
    kind: str
    arguments: list
    sizes: dict


def fuse(module, kernel_of):
    """Replaces operators of a captured function by kernels.

    Args:
        module: `torch.fx.GraphModule`, changed in place.
        kernel_of: Function from a `Fused` to what `Graph.call_function()`
            takes, or to `None` if there is no kernel.
    """
    graph = module.graph
    for node in graph.nodes:
        for find in (_normalized, _rotated, _gated, _sum):
            found = find(module, node)
            kernel = None if found is None else kernel_of(found)
            if kernel is None:
                continue
            with graph.inserting_before(found.last):
                fused = graph.call_function(*kernel)
            fused.meta = found.last.meta
            found.last.replace_all_uses_with(fused)
            break
    graph.eliminate_dead_code()
    module.recompile()


def dtype_of(node):
    """The dtype of a tensor that kernels read, a str, or `None`."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    name = str(value.dtype).removeprefix("torch.")
    return name if name in _FLOATS else None


def _normalized(module, node):
    """A kernel for `x * rsqrt(mean(x ** 2) + epsilon)`, and what follows.

    That may be a product with a weight and a conversion.

    Returns:
        A `Fused`, or `None`.
    """
    for wide, root in _either_way(node, _aten.mul.Tensor):
        total = _argument_of(root, _aten.rsqrt.default)
        if not _is_call(total, _aten.add.Tensor):
            continue
        mean, epsilon = total.args
        if not isinstance(epsilon, float):
            continue
        if not _is_call(mean, _aten.mean.dim) or mean.args[1:] != ([-1], True):
            continue
        if not _is_square(module, mean.args[0], wide):
            continue
        if dtype_of(wide) != "float32" or not _are_alike(wide, node):
            continue
        x = _unwidened(wide)
        *rows, width = wide.meta["val"].shape
        weight, last = _times_weight(node, width)
        last = _converted(last)
        narrow = None if weight is None else _unwidened(weight)
        sizes = {"rows": math.prod(rows), "width": width, "epsilon": epsilon}
        return Fused(last, "normalize", [x, narrow], sizes)
    return None


def _times_weight(node, width):
    """The weight that the last axis is multiplied with, if it is, and where."""
    if len(node.users) == 1:
        (user,) = node.users
        for x, weight in _either_way(user, _aten.mul.Tensor):
            value = weight.meta["val"]
            if (
                x is node
                and dtype_of(weight) is not None
                and dtype_of(user) == "float32"
                and tuple(value.shape[-1:]) == (width,) == (value.numel(),)
                and _are_alike(x, user)
            ):
                # Kernels stand where the operators did, behind what they read.
                return weight, user
    return None, node


def _converted(node):
    """What a tensor is converted to, if nothing else is done with it."""
    if len(node.users) == 1:
        (user,) = node.users
        if _is_conversion(user):
            return user
    return node


def _unwidened(node):
    """What a tensor was widened from, which kernels do themselves.

    One that was rounded is not what it was rounded from.
    """
    widens = _is_conversion(node) and dtype_of(node) == "float32"
    return node.args[0] if widens else node


def _is_conversion(node):
    return (
        _is_call(node, _aten._to_copy.default)
        and set(node.kwargs) == {"dtype"}
        and dtype_of(node) is not None
        and dtype_of(node.args[0]) is not None
    )


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
    """A kernel for `x * cos + turned(x) * sin`.

    The halves of `turned(x)` are the second half of `x`, negative, and the
    first.
    """
    for first, second in _either_way(node, _aten.add.Tensor):
        for x, cos in _either_way(first, _aten.mul.Tensor):
            for turned, sin in _either_way(second, _aten.mul.Tensor):
                if _is_turned(turned, x) and _are_alike(x, node):
                    sizes = _sizes_of_rotation(x, cos, sin)
                    if sizes is not None:
                        return Fused(node, "rotate", [x, cos, sin], sizes)
    return None


def _gated(module, node):
    """A kernel for `silu(x) * y`."""
    for activated, y in _either_way(node, _aten.mul.Tensor):
        # Computed in float32, and rounded to what the numbers are.
        rounds = _is_conversion(activated) and dtype_of(activated) != "float32"
        wide = activated.args[0] if rounds else activated
        x = _argument_of(wide, _aten.silu.default)
        if x is None or dtype_of(x) != "float32":
            continue
        x = _unwidened(x) if rounds else x
        if _are_alike(x, node) and _are_alike(y, node):
            *rows, width = node.meta["val"].shape
            sizes = {"rows": math.prod(rows), "width": width}
            return Fused(node, "gate", [x, y], sizes)
    return None


def _sum(module, node):
    """A kernel for `x + y`, where `y` may be one row for all of `x`."""
    for x, y in _either_way(node, _aten.add.Tensor):
        if not _are_alike(x, node) or dtype_of(y) != dtype_of(x):
            continue
        *rows, width = node.meta["val"].shape or (1,)
        rows, other = math.prod(rows), tuple(y.meta["val"].shape)
        if other != tuple(node.meta["val"].shape):
            if other[-1:] != (width,) or math.prod(other) != width:
                continue
            other_rows = 1
        else:
            other_rows = rows
        sizes = {"rows": rows, "width": width, "other_rows": other_rows}
        return Fused(node, "add", [x, y], sizes)
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
        if tuple(part.meta["val"].shape) != angles or dtype_of(
            part
        ) != dtype_of(x):
            return None
    if angles not in ((rows, length, 1, width), (1, 1, 1, width)):
        return None
    return {
        "rows": math.prod(shape[:-1]),
        "width": width,
        "heads": heads,
        "angles": angles[0] * angles[1],
    }


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


def _are_alike(x, node):
    """Whether a kernel reads one and returns what is like the other."""
    return (
        dtype_of(x) is not None
        and dtype_of(x) == dtype_of(node)
        and x.meta["val"].shape == node.meta["val"].shape
    )
