"""Finds the weights of a model that kernels of our own can multiply with."""

import dataclasses

import keras
from keras import ops

from keras_nlp_cache.device import constants
from keras_nlp_cache.kernels import availability
from keras_nlp_cache.products import choice
from keras_nlp_cache.products.layers import is_exactly
from keras_nlp_cache.products.layers import matrix_of
from keras_nlp_cache.products.layers import specialize_dense
from keras_nlp_cache.products.logits import is_known
from keras_nlp_cache.products.logits import matrix_variables
from keras_nlp_cache.products.packing import Form
from keras_nlp_cache.products.packing import Weight
from keras_nlp_cache.products.packing import Weights
from keras_nlp_cache.quantization.groups import GROUP
from keras_nlp_cache.quantization.groups import in_groups

_FLOATS = ("float32", "bfloat16", "float16")


def find_weights(model):
    """Finds what is worth a product of our own, and has layers ask for it.

    Dense layers get the classes of `layers.py`. That changes nothing about them
    but where their products are made in a decode step.

    Args:
        model: A `keras.Model`.

    Returns:
        `Weights`, or `None` if kernels of our own do not run here.
    """
    if availability.why_not() is not None:
        return None
    found = {}
    backbone = getattr(model, "backbone", None)
    only_in_prefill = {id(x) for x in getattr(backbone, "prefill_layers", ())}
    for layer in model._flatten_layers():
        weight = None
        if not layer.built or id(layer) in only_in_prefill:
            continue
        if is_exactly(layer, keras.layers.Dense) or is_exactly(
            layer, keras.layers.EinsumDense
        ):
            weight = _of_dense(layer)
        elif is_known(layer):
            weight = _of_logits(layer)
        if weight is None or id(weight.variable) in found:
            continue
        form = weight.form
        if choice.most_rows(form.dtype) == 0:
            continue
        if form.outputs * form.depth >= constants().least_product:
            found[id(weight.variable)] = weight
            specialize_dense(layer)
    return Weights(found)


def _of_dense(layer):
    if layer.quantization_mode not in (None, "int8", "int4"):
        return None
    sizes = matrix_of(layer)
    if sizes is None:
        return None
    depth, outputs = sizes
    if layer.quantization_mode == "int4":
        return _of_int4(
            layer,
            layer._kernel,
            layer.kernel_scale,
            getattr(layer, "kernel_zero", None),
            Form("int4", outputs, depth),
        )
    if in_groups(layer):
        form = Form("int8_in_groups", outputs, depth, block=GROUP)
        return _of_int8_in_groups(layer._kernel, layer.kernel_scale, form)
    if layer.quantization_mode is None and layer.lora_enabled:
        return None  # The kernel is a sum.
    return _of_numbers(layer, layer._kernel, Form("", outputs, depth))


def _of_logits(layer):
    variable, scale, zero = matrix_variables(layer)
    tied = layer.tie_weights
    form = Form("int4", layer.input_dim, layer.output_dim, transposed=tied)
    if layer.quantization_mode == "int8" and in_groups(layer):
        form = dataclasses.replace(form, dtype="int8_in_groups", block=GROUP)
        return _of_int8_in_groups(variable, scale, form)
    if layer.quantization_mode != "int4":
        return _of_numbers(layer, variable, form)
    form = dataclasses.replace(form, pairs=1 if tied else 0)
    return _of_int4(layer, variable, scale, zero, form)


def _of_numbers(layer, variable, form):
    """The weight of a layer whose variable has the numbers themselves."""
    stored = keras.backend.standardize_dtype(variable.dtype)
    if layer.quantization_mode == "int8":
        return Weight(dataclasses.replace(form, dtype="int8"), variable)
    dtype = getattr(layer, "reverse_dtype", None) or layer.compute_dtype
    if dtype not in _FLOATS or stored not in _FLOATS:
        return None
    form = dataclasses.replace(form, dtype=dtype, is_stored=stored == dtype)
    return Weight(form, variable)


def _of_int8_in_groups(variable, scale, form):
    def scales():
        by_group = ops.convert_to_numpy(scale.value)
        # Of the embeddings that are tied, groups are in the last axis.
        return (by_group.T if form.transposed else by_group,)

    return Weight(form, variable, scales, [scale])


def _of_int4(layer, variable, scale, zero, form):
    block = layer._int4_block_size
    in_groups = block is not None and block > 0
    if not in_groups:
        block = form.depth
    form = dataclasses.replace(form, block=block)

    def scales():
        by_group = ops.convert_to_numpy(scale.value).astype("float32")
        if not in_groups:
            # What numbers were multiplied with, one for each channel.
            return 1 / by_group.reshape(1, -1), None
        zeros = ops.convert_to_numpy(zero.value).astype("float32")
        # Of the embeddings that are tied, groups are in the last axis.
        if form.transposed:
            return by_group.T, zeros.T
        return by_group, zeros

    further = [scale] if zero is None else [scale, zero]
    return Weight(form, variable, scales, further)
