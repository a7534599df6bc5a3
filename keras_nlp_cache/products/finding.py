"""Finds the weights of a model that kernels of our own can multiply with."""

import dataclasses

import keras
from keras import ops

from keras_nlp_cache.device import constants
from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.kernels import availability
from keras_nlp_cache.products import choice
from keras_nlp_cache.products.layers import matrix_of
from keras_nlp_cache.products.layers import specialize_dense
from keras_nlp_cache.products.logits import is_known
from keras_nlp_cache.products.logits import matrix_variables
from keras_nlp_cache.products.packing import Form
from keras_nlp_cache.products.packing import Weight
from keras_nlp_cache.products.packing import Weights
from keras_nlp_cache.products.together import layers_together
from keras_nlp_cache.products.together import rounding_of
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
    found, of_layers = {}, []
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
        if choice.most_rows(weight.form.kind) > 0:
            found[id(weight.variable)] = weight
            of_layers.append((layer, weight))
    together = _together(backbone, {id(x): y for x, y in of_layers})
    sizes = {
        id(weight): sum(x.form.outputs for x in weights) * weight.form.depth
        for weights in [*[[x] for x in found.values()], *together]
        for weight in weights
    }
    worth = [
        (layer, weight)
        for layer, weight in of_layers
        if sizes[id(weight)] >= constants().least_product
    ]
    for layer, _ in worth:
        specialize_dense(layer)
    return Weights(
        {id(weight.variable): weight for _, weight in worth},
        [x for x in together if sizes[id(x[0])] >= constants().least_product],
    )


def _together(backbone, by_layer):
    """Lists of weights that have the same input, and can be packed as one."""
    found, seen = [], set()
    for layers in layers_together(backbone):
        layers = [
            x
            for x in layers
            if id(x) in by_layer and rounding_of(x) is not None
        ]
        weights = [by_layer[id(x)] for x in layers]
        kinds = {
            (dataclasses.replace(x.form, outputs=0), rounding_of(layer))
            for x, layer in zip(weights, layers)
        }
        if len(weights) < 2 or len(kinds) > 1:
            continue
        # A block may be called more than once.
        if weights[0].form.needs_packing and seen.isdisjoint(map(id, weights)):
            seen.update(map(id, weights))
            found.append(weights)
    return found


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
        scale = getattr(layer, "kernel_scale", None)
        rounds = bool(rounding_of(layer))
        form = dataclasses.replace(form, dtype="int8", rounds=rounds)
        return Weight(form, variable, scale=scale)
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
