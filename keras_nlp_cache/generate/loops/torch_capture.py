"""A PyTorch function, captured once and replayed without Keras.

A decode step of a small model spends most of its time in Python, calling
layers. Captured, it is a list of operators and no more. Those that give the
same result at every call or in every layer (rotary tables, masks, conversions)
are then done once.
"""

import operator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from keras_nlp_cache.generate.loops.torch_copies import has_copies
from keras_nlp_cache.generate.loops.torch_copies import modified_arguments
from keras_nlp_cache.generate.loops.torch_copies import storage_of

_aten = torch.ops.aten
_RESHAPES = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.expand.default,
    _aten.permute.default,
    _aten.transpose.int,
)


def capture(function, *args):
    """Captures what a function does to tensors.

    Args:
        function: Takes tensors, in any nesting, and returns tensors. May modify
            its arguments in place. What it does must not depend on values.
        *args: Tensors to capture it with. Only their shapes, dtypes and
            devices count: nothing is computed.

    Returns:
        A `torch.fx.GraphModule` that takes the arguments of the function as one
        flat list.
    """
    flat, structure = pytree.tree_flatten(args)

    def flat_function(*flat):
        return function(*pytree.tree_unflatten(flat, structure))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        fakes = [mode.from_tensor(x.detach()) for x in flat]
        module = make_fx(flat_function)(*fakes)
        if has_copies(module.graph):
            # What they return is still known as that of the first.
            prop = FakeTensorProp(module, mode)
            prop.propagate_dont_convert_inputs(*fakes)
    _fold_constants(module)
    _merge_reshapes(module.graph)
    _share_repeated(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def separate_views(module, count):
    """Splits off what only reshapes the first arguments.

    Args:
        module: From `capture()`. Changed in place.
        count: int. How many of its arguments are the same in many calls.

    Returns:
        A tuple `(prepare, module)` of `torch.fx.GraphModule`s. `prepare` takes
        those arguments and returns a tuple of views of them. `module` takes
        that tuple's elements and the other arguments.
    """
    graph, outside = module.graph, torch.fx.Graph()
    fixed = [x for x in graph.nodes if x.op == "placeholder"][:count]
    copies = {x: outside.placeholder(x.name) for x in fixed}
    for node in graph.nodes:
        if node.target in (*_RESHAPES, _aten.t.default):
            if all(x in copies for x in node.all_input_nodes):
                copies[node] = outside.node_copy(node, copies.get)
    used = [x for x in copies if any(user not in copies for user in x.users)]
    outside.output(tuple(copies[x] for x in used))
    with graph.inserting_before(next(iter(graph.nodes))):
        for node in used:
            argument = graph.placeholder(f"view_of_{node.name}")
            argument.meta = node.meta
            node.replace_all_uses_with(
                argument, delete_user_cb=lambda user: user not in copies
            )
    for node in reversed(copies):
        graph.erase_node(node)
    module.recompile()
    return torch.fx.GraphModule({}, outside), module


def multiplies(module):
    """Whether a captured function has matrix products of PyTorch's.

    Args:
        module: `torch.fx.GraphModule`.
    """
    names = ("mm", "bmm", "addmm", "baddbmm", "mv", "dense_product")
    names += ("_linear_pointwise", "convolution", "_scaled_mm")
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.overloadpacket.__name__ in names
        for node in module.graph.nodes
    )


def _is_repeatable(node):
    """Whether a call has no effect and always the same result."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return not node.target._schema.is_mutable


def _written_to(graph):
    """The storages that some call in a graph writes into."""
    return {
        _storage(x) for node in graph.nodes for x in modified_arguments(node)
    } - {None}


def _storage(node):
    return storage_of(node.meta.get("val"))


def _fold_constants(module):
    """Computes now what depends on no argument, and keeps one of each."""
    graph, values, constants = module.graph, {}, {}
    # What is written into, such as zeros to fill, is not the same every time.
    written = _written_to(graph)

    def value_of(x):
        return values[x] if isinstance(x, torch.fx.Node) else x

    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function" and _is_repeatable(node):
            if _storage(node) not in written and all(
                x in values for x in node.all_input_nodes
            ):
                args, kwargs = torch.fx.node.map_arg(
                    (node.args, node.kwargs), value_of
                )
                values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        if all(user in values for user in node.users):
            continue
        key = (value.dtype, tuple(value.shape), str(value.tolist()))
        if key not in constants:
            name = f"constant_{len(constants)}"
            module.register_buffer(name, value, persistent=False)
            with graph.inserting_before(next(iter(graph.nodes))):
                constants[key] = graph.get_attr(name)
            constants[key].meta = node.meta
        node.replace_all_uses_with(constants[key])
    graph.eliminate_dead_code()


def _merge_reshapes(graph):
    """Replaces chains of reshapes by one, and those to the same shape by none.

    A view of a contiguous tensor that is itself contiguous, and as large, is
    the same memory under another shape. In a decode step, where many dimensions
    are 1, that is what most permutations come to.
    """

    def is_reshape(node):
        return (
            node.target in _RESHAPES
            and node.meta["val"].is_contiguous()
            and node.args[0].meta["val"].is_contiguous()
            and node.args[0].meta["val"].numel() == node.meta["val"].numel()
        )

    for node in graph.nodes:
        if not is_reshape(node):
            continue
        shape, source = list(node.meta["val"].shape), node.args[0]
        if is_reshape(source):
            source = source.args[0]
        if list(source.meta["val"].shape) == shape:
            node.replace_all_uses_with(source)
        else:
            node.target, node.args = _aten.view.default, (source, shape)


def _share_repeated(graph):
    """Replaces a call by an earlier one of the same operator and arguments."""
    modified, first = _written_to(graph), {}
    for node in graph.nodes:
        if node.op != "call_function" or not _is_repeatable(node):
            continue
        # Two calls that read memory which is modified in between differ. What
        # such a call returned stays as it is, and may be shared.
        if any(_storage(x) in modified for x in (node, *node.all_input_nodes)):
            continue
        key = node.target, repr(node.args), repr(node.kwargs)
        node.replace_all_uses_with(first.setdefault(key, node))
