"""A captured step whose kernels run one after the other, without Python.

A step is bound to weights, to a cache and to inputs that stay where they are.
Here all that it computes on the way stays where it is as well: then a call of a
kernel is a list of addresses, and kernels that follow each other are one call
from Python. It is what a CUDA graph is on a GPU.
"""

import functools
import math
import operator

import numpy as np
import torch

from keras_nlp_cache.generate.loops.step_kernels import PUT
from keras_nlp_cache.kernels import torch_call


def record(module, arguments):
    """Runs a captured function, and records what it does.

    Args:
        module: `torch.fx.GraphModule`, as captured, that returns one tensor.
        arguments: List of tensors, which are read and written where they are
            whenever it runs.

    Returns:
        A tuple of a function without arguments that does the same again, and
        what it returned: the same tensor whenever it runs.
    """
    recorder = _Recorder(module, arguments)
    output = recorder.run()
    actions = recorder.finished()

    def replay():
        for action in actions:
            action()
        return output

    return replay, output


class _Recorder:
    """Runs a graph node by node, and notes what is to be done each time."""

    def __init__(self, module, arguments):
        self._module, self._arguments = module, iter(arguments)
        self._values, self._kept = {}, []
        self._actions, self._jobs = [], []

    def run(self):
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(self._arguments)
            elif node.op == "get_attr":
                target = operator.attrgetter(node.target)
                self._values[node] = target(self._module)
            elif node.op == "output":
                (output,) = self._known(node.args)
                return output
            elif node.target is torch_call.OPERATOR:
                self._values[node] = self._kernel(*self._known(node.args))
            elif _puts(node):
                self._values[node] = self._put(*self._known(node.args))
            else:
                self._values[node] = self._operator(node)

    def finished(self):
        """What is to be done, a list of functions."""
        self._run_jobs_together()
        return self._actions

    def _known(self, args):
        return torch.fx.node.map_arg(args, self._values.__getitem__)

    def _kernel(self, arguments, number, shape, dtype, sizes, pieces):
        arguments = [x if x is None else self._contiguous(x) for x in arguments]
        result = torch.empty(shape, dtype=getattr(torch, dtype))
        job = torch_call.job(arguments, number, result, sizes, pieces)
        torch_call.run(job[None])
        # Which a job has no more than the addresses of.
        self._kept.append((arguments, result))
        self._jobs.append(job)
        return result

    def _put(self, cache, axis, index, source):
        """Writes to one place of a cache, by a kernel."""
        index, source = self._contiguous(index), self._contiguous(source)
        width = math.prod(cache.shape[axis + 1 :]) * cache.itemsize
        sizes = math.prod(cache.shape[:axis]), width, 0, cache.shape[axis]
        arguments = [source, index]
        job = torch_call.job(arguments, PUT.number, cache, sizes, 1)
        torch_call.run(job[None])
        self._kept.append((arguments, cache))
        self._jobs.append(job)
        return cache

    def _contiguous(self, x):
        if x.is_contiguous():
            return x
        copy = torch.empty(x.shape, dtype=x.dtype)
        self._do(functools.partial(copy.copy_, x))
        return copy

    def _operator(self, node):
        """The value of a node, which is there whenever others are computed."""
        args, kwargs = self._known(node.args), self._known(node.kwargs)
        call = functools.partial(node.target, *args, **kwargs)
        kind = _kind(node.target)
        if kind == "view":
            return call()
        if kind == "modifies":
            return self._do(call)
        return self._stays(call)

    def _stays(self, call):
        """What a function returns, in memory where it is put each time."""
        value = call()
        if isinstance(value, torch.Tensor):

            def put():
                value.copy_(call())

            self._add(put)
        elif isinstance(value, (tuple, list)):

            def put():
                for x, y in zip(value, call()):
                    x.copy_(y)

            self._add(put)
        else:
            raise TypeError(
                "Expected operators of a step to return tensors. Received: "
                f"{type(value).__name__} from {call.func}."
            )
        return value

    def _do(self, call):
        self._add(call)
        return call()

    def _add(self, action):
        self._run_jobs_together()
        self._actions.append(action)

    def _run_jobs_together(self):
        if self._jobs:
            jobs, kept = np.array(self._jobs), self._kept
            self._actions.append(functools.partial(_run_kept, jobs, kept))
            self._jobs, self._kept = [], []


def _run_kept(jobs, kept):
    """Runs jobs, while the tensors that they have the addresses of are kept."""
    torch_call.run(jobs)


def _puts(node):
    """Whether a node writes to one place of a cache."""
    if node.target is not torch.ops.aten.index_copy_.default or node.kwargs:
        return False
    cache, axis, index, source = (
        x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in node.args
    )
    return (
        axis >= 0
        and index.numel() == 1
        and index.dtype == torch.int64
        and cache.is_contiguous()
        and cache.dtype == source.dtype
    )


@functools.cache
def _kind(target):
    """What an operator returns: `"view"`s, what it `"modifies"`, or new."""
    if target is operator.getitem:
        return "view"
    schema = getattr(target, "_schema", None)
    if schema is None:
        return "new"
    if schema.is_mutable:
        return "modifies"
    aliases = [x.alias_info is not None for x in schema.returns]
    return "view" if all(aliases) else "new"
