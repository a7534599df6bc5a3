"""A function of which a PyTorch graph has copies, and was traced once.

To trace an operator takes longer than to run it, and a model has the same ones
in each of its blocks.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

_IS_COPY = "keras_nlp_cache_is_copy"


class Copied:
    """A function for a graph that is being captured.

    The first call traces it. Later ones copy what that put into the graph, with
    other arguments, where this is known to be the same.

    Args:
        function: Takes tensors, in any nesting, and returns tensors. What else
            it reads is the same in each call, and is none of its arguments.
    """

    def __init__(self, function):
        self._function = function
        self._traced = None

    def __call__(self, *args):
        mode = proxy_tensor.get_proxy_mode()
        leaves, _ = pytree.tree_flatten(args)
        if mode is None or not all(
            isinstance(x, FakeTensor) and _node_of(x, mode.tracer) is not None
            for x in leaves
        ):
            return self._function(*args)
        if self._traced is None:
            self._traced = _Traced(mode.tracer, self._function, args, leaves)
            return self._traced.output
        if not self._traced.can_be_copied_for(leaves):
            return self._function(*args)
        return self._traced.copied_for(leaves)


class _Traced:
    """What one call put into a graph."""

    def __init__(self, tracer, function, args, leaves):
        self._tracer, self._leaves = tracer, leaves
        self._before = [_node_of(x, tracer) for x in leaves]
        earlier = list(tracer.graph.nodes)
        self.output = function(*args)
        self._nodes = list(tracer.graph.nodes)[len(earlier) :]
        self._after = [_node_of(x, tracer) for x in leaves]
        self._outputs, self._structure = pytree.tree_flatten(self.output)
        # What is written into later stands for something else.
        self._returned = [_node_of(x, tracer) for x in self._outputs]
        self._is_alone = self._changes_arguments_alone(earlier)

    def _changes_arguments_alone(self, earlier):
        """Whether all that is written into, or returned, is new or its own."""
        given = {storage_of(x) for x in self._leaves}
        others = {storage_of(x.meta.get("val")) for x in earlier} - given
        written = {
            storage_of(x.meta.get("val"))
            for node in self._nodes
            for x in modified_arguments(node)
        }
        returned = {
            storage_of(x) for x in self._outputs if not _is_in(x, self._leaves)
        }
        return not written & others and not returned & (others | given)

    def can_be_copied_for(self, leaves):
        """Whether a call with these would put the same into the graph."""
        if not self._is_alone:
            return False
        # Two arguments that were one have to be one, and the other way round.
        pairs = {
            (x, _node_of(y, self._tracer)) for x, y in zip(self._before, leaves)
        }
        old, new = ({pair[i] for pair in pairs} for i in range(2))
        return len(pairs) == len(old) == len(new)

    def copied_for(self, leaves):
        """What the call returns with other arguments."""
        graph = self._tracer.graph
        copies = {
            x: _node_of(y, self._tracer) for x, y in zip(self._before, leaves)
        }
        for node in self._nodes:
            copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
            copies[node].meta = {**node.meta, _IS_COPY: True}
        for new, before, after in zip(leaves, self._before, self._after):
            if before is not after:
                # It was written into, and stands for what that returned.
                self._track(new, copies[after])
        outputs = []
        for old, node in zip(self._outputs, self._returned):
            if _is_in(old, self._leaves):
                outputs.append(leaves[_index_in(old, self._leaves)])
                continue
            with (
                proxy_tensor.disable_proxy_modes_tracing(),
                old.fake_mode,
            ):
                new = torch.empty_strided(
                    old.shape, old.stride(), dtype=old.dtype, device=old.device
                )
            self._track(new, copies[node])
            outputs.append(new)
        return pytree.tree_unflatten(outputs, self._structure)

    def _track(self, x, node):
        proxy = torch.fx.Proxy(node, self._tracer)
        proxy_tensor.track_tensor_tree(
            x, proxy, constant=None, tracer=self._tracer
        )


def has_copies(graph):
    """Whether some of a graph was copied."""
    return any(_IS_COPY in node.meta for node in graph.nodes)


def _node_of(x, tracer):
    """The node of a tensor in a graph that is being captured, if it has one."""
    found = proxy_tensor.get_proxy_slot(x, tracer, None)
    return None if found is None else found.proxy.node


def _is_in(x, tensors):
    return any(x is y for y in tensors)


def _index_in(x, tensors):
    return next(i for i, y in enumerate(tensors) if x is y)


def modified_arguments(node):
    """The arguments of a call that it modifies in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [
        x
        for x, argument in zip(node.args, node.target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def storage_of(x):
    """What a tensor shares with its views, `None` for anything else."""
    if isinstance(x, torch.Tensor):
        return x.untyped_storage()._cdata
    return None
