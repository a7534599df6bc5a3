"""Products of our own on PyTorch, as one operator.

A captured step has it as a whole, and Inductor leaves it as it is.
"""

import functools

import torch
from numba import types

from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.compiling import compiled
from keras_nlp_cache.kernels.machine_words import words
from keras_nlp_cache.kernels.own_threads import ask_for_help
from keras_nlp_cache.kernels.own_threads import helpers_state
from keras_nlp_cache.products import kernels

_LIBRARY = torch.library.Library("keras_nlp_cache", "FRAGMENT")
_LIBRARY.define(
    "packed_product(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, "
    "int kind, int outputs, int block) -> Tensor"
)
_RESULTS = {"float32": torch.float32, "int32": torch.int32}


def multiply(form, x, weight, scale=None, zero=None):
    """`x @ weight.T` by one operator.

    Args:
        form: `packing.Form` of the weight.
        x: float32 tensor `(rows, K)`, or int8.
        weight: Tensor as from `packing.packed()`.
        scale: Of `"int4"`, as well.
        zero: Of `"int4"`, as well.

    Returns:
        A float32 tensor `(rows, N)`, int32 if `x` is int8.
    """
    kind = kernels.kind_of(form.dtype, str(x.dtype).removeprefix("torch."))
    return torch.ops.keras_nlp_cache.packed_product(
        x, weight, scale, zero, kind, form.outputs, form.packed_block
    )


def packed_product(x, weight, scale, zero, kind, outputs, block):
    """What the operator does, without PyTorch looking for it first."""
    x = x.contiguous()
    rows, depth = x.shape
    y = torch.empty((rows, outputs), dtype=_result(kind))
    _run()(
        _kernel(kind),
        weight.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        outputs,
        depth,
        rows,
        block,
        weight.nbytes,
        helpers_state(),
        torch.get_num_threads() - 1,
    )
    return y


_LIBRARY.impl("packed_product", packed_product, "CompositeExplicitAutograd")


@torch.library.register_fake("keras_nlp_cache::packed_product", lib=_LIBRARY)
def _(x, weight, scale, zero, kind, outputs, block):
    return x.new_empty((x.shape[0], outputs), dtype=_result(kind))


def call_directly(module):
    """Has a captured function call products without PyTorch in between.

    PyTorch takes 3 of the 8 microseconds of a call to find the operator.

    Args:
        module: `torch.fx.GraphModule`, changed in place.
    """
    for node in module.graph.nodes:
        if node.target is torch.ops.keras_nlp_cache.packed_product.default:
            node.target = packed_product
    module.recompile()


def _result(kind):
    return _RESULTS[kernels.KINDS[kind].result]


def _product(
    kernel,
    weight,
    x,
    y,
    scale,
    zero,
    outputs,
    depth,
    rows,
    block,
    weight_bytes,
    state,
    helpers,
):
    job = jobs.new_job(weight_bytes, rows)
    q = words(job, jobs.WORDS)
    q[jobs.KERNEL] = kernel
    q[jobs.WEIGHT] = weight
    q[jobs.INPUTS] = x
    q[jobs.RESULTS] = y
    q[jobs.SCALE] = scale
    q[jobs.ZERO] = zero
    q[jobs.OUTPUTS] = outputs
    q[jobs.DEPTH] = depth
    q[jobs.ROWS] = rows
    q[jobs.BLOCK] = block
    helpers = min(helpers, q[jobs.PIECES] - 1)
    if state != 0 and helpers > 0:
        ask_for_help(state, job, helpers)
    jobs.finish(job)


@functools.cache
def _kernel(kind):
    return kernels.kernel(kind).address


@functools.cache
def _run():
    """`_product()`, to be called with integers, without Python's lock."""
    return _compiled_product().ctypes


@functools.cache
def _compiled_product():
    return compiled(types.void(*[types.int64] * 13), _product)
