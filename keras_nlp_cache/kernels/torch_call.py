"""Kernels on PyTorch, as one operator.

A captured step has it as a whole, and Inductor leaves it as it is.
"""

import functools

import numpy as np
import torch
from numba import types

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.compiling import compiled
from keras_nlp_cache.kernels.kernel import KERNELS
from keras_nlp_cache.kernels.machine_words import words
from keras_nlp_cache.kernels.own_threads import ask_for_help
from keras_nlp_cache.kernels.own_threads import helpers_state

_LIBRARY = torch.library.Library("keras_nlp_cache", "FRAGMENT")
_LIBRARY.define(
    "kernel(Tensor?[] arguments, int number, int[] shape, str dtype, "
    "int[] sizes, int pieces) -> Tensor"
)


def call(kernel, arguments, shape, dtype, sizes, pieces):
    """What `Kernel` does on PyTorch, by one operator."""
    return torch.ops.keras_nlp_cache.kernel(
        arguments, kernel.number, shape, dtype, sizes, pieces
    )


def kernel(arguments, number, shape, dtype, sizes, pieces):
    """What the operator does."""
    bound = _bound(number, tuple(shape), dtype, tuple(sizes), pieces)
    return bound(*arguments)


@functools.lru_cache(maxsize=1024)
def _bound(number, shape, dtype, sizes, pieces):
    """A kernel of which all is known but its arguments.

    Returns:
        A function from tensors and `None`s to a tensor.
    """
    run, address = _run(), KERNELS[number].code.address
    dtype = getattr(torch, dtype)
    kept, count = np.array(sizes, np.int64), len(sizes)
    place = kept.ctypes.data

    def kernel(*arguments):
        # Copies stay until the kernel has read them.
        arguments = [x if x is None else x.contiguous() for x in arguments]
        addresses = [0 if x is None else x.data_ptr() for x in arguments]
        addresses += [0] * (jobs.MOST_ARGUMENTS - len(addresses))
        y = torch.empty(shape, dtype=dtype)
        run(
            address,
            pieces,
            place,
            count,
            helpers_state(),
            torch.get_num_threads() - 1,
            y.data_ptr(),
            *addresses,
        )
        return y

    # Which it reads from.
    kernel.sizes = kept
    return kernel


_LIBRARY.impl("kernel", kernel, "CompositeExplicitAutograd")
# What a captured function calls.
OPERATOR = torch.ops.keras_nlp_cache.kernel.default


@torch.library.register_fake("keras_nlp_cache::kernel", lib=_LIBRARY)
def _(arguments, number, shape, dtype, sizes, pieces):
    (first, *_) = arguments
    return first.new_empty(shape, dtype=getattr(torch, dtype))


def call_directly(module):
    """Has a captured function call kernels without PyTorch in between.

    PyTorch takes 3 of the 8 microseconds of a call to find the operator. And
    since a kernel reads memory, whatever its shape, and writes it in any, what
    only reshapes its arguments or what it returns is left out.

    Args:
        module: `torch.fx.GraphModule`, changed in place.
    """
    graph = module.graph
    for node in graph.nodes:
        if node.target is not OPERATOR:
            continue
        arguments, number, shape, dtype, sizes, pieces = node.args
        arguments = [x if x is None else _unreshaped(x) for x in arguments]
        (user, *others) = node.users
        if not others and _is_reshape(user):
            shape = list(user.meta["val"].shape)
            user.replace_all_uses_with(node)
            node.meta["val"] = user.meta["val"]
        node.target = _bound(number, tuple(shape), dtype, tuple(sizes), pieces)
        node.args = tuple(arguments)
    graph.eliminate_dead_code()
    module.recompile()


def _unreshaped(node):
    """What a node of a captured function reshapes, or itself."""
    while _is_reshape(node) and node.args[0].meta["val"].is_contiguous():
        node = node.args[0]
    return node


def _is_reshape(node):
    return node.target is torch.ops.aten.view.default


def _run_job(
    kernel, pieces, sizes, count, state, helpers, result, a, b, c, d, e, f, g, h
):
    job = jobs.new_job(pieces)
    q = words(job, jobs.WORDS)
    q[jobs.KERNEL] = kernel
    q[jobs.RESULT] = result
    for i, address in enumerate((a, b, c, d, e, f, g, h)):
        q[jobs.ARGUMENTS + i] = address
    given = words(sizes, count)
    for i in range(count):
        q[jobs.SIZES + i] = given[i]
    helpers = min(helpers, pieces - 1)
    if state != 0 and helpers > 0:
        ask_for_help(state, job, helpers)
    jobs.finish(job)


@functools.cache
def _run():
    """`_run_job()`, to be called with integers, without Python's lock."""
    return _compiled_run().ctypes


@functools.cache
def _compiled_run():
    count = 7 + jobs.MOST_ARGUMENTS
    return compiled(types.void(*[types.int64] * count), _run_job)
