"""What of a task is quantized, and in which order.

GPTQ and AWQ see a backbone as what comes first, and then one block at a time.
They quantize one block after the other, each with the activations that the
blocks before it, already quantized, produce.
"""

import contextlib

import keras
import numpy as np
from keras.src.quantizers.utils import should_quantize_layer

from keras_nlp_cache.garbage import collecting_new
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.quantization.groups import policy_of
from keras_nlp_cache.quantization.logits import mend_quantized


def floating_policy(layer):
    """The dtype policy of a layer, as it was before it was quantized.

    A quantized layer computes by methods for its mode, which a layer that
    surgery puts beside it does not have.

    Args:
        layer: A layer, whose policy may be one for each layer of a model.

    Returns:
        A `keras.DTypePolicy`.
    """
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return keras.DTypePolicy(
        compute if compute == variable else f"mixed_{compute}"
    )


def policies(layers):
    """The dtype policies of quantized layers, by their paths.

    For a `keras.dtype_policies.DTypePolicyMap`, which takes patterns. A layer
    that Keras names gets another number when it is built again.
    """
    layers = list(layers)
    named = {layer.path: layer for layer in layers if layer.path}
    return {
        weight_paths.pattern(layer.path, named): policy
        for layer in layers
        if isinstance(
            policy := policy_of(layer),
            keras.dtype_policies.QuantizedDTypePolicy,
        )
    }


def use_own_policies(model):
    """Gives layers that were loaded quantized the policies they had before.

    Keras builds them with one map of all that is quantized. But what it then
    asks for in some places is the policy of the layer, not of its path, and it
    cannot save them again.

    Args:
        model: A model. What else a map may be for is left as it is.
    """
    for layer in model._flatten_layers():
        policy = layer.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            if all(
                isinstance(x, keras.dtype_policies.QuantizedDTypePolicy)
                for x in policy.values()
            ):
                # Set in the usual way, it would be quantized once more.
                layer._dtype_policy = policy_of(layer)


@contextlib.contextmanager
def quantizing(backbone):
    """In this scope, Keras quantizes a backbone, quickly and to be trained on.

    Args:
        backbone: A `CachedBackbone`.
    """
    # Keras collects garbage once for each weight that a quantized layer no
    # longer has, which for SmolLM2-135M takes 83 seconds, and 5 in this scope,
    # with the same memory at the peak.
    with collecting_new():
        yield
    mend_quantized(backbone.token_embedding)
    mend_quantized(backbone.output_embedding)


class _Stop(Exception):
    """Leaves a graph at its first block."""

    def __init__(self, x):
        self.x = x


def leaving_out(layer, filters):
    """Filters for `keras.Model.quantize()` that let no part of a layer pass.

    Args:
        layer: A layer. It and all in it are left out.
        filters: What else to filter by, in any way that Keras knows.
    """
    known = (type(None), str, list, tuple)
    if not isinstance(filters, known) and not callable(filters):
        return filters  # For Keras to refuse.
    outside = {id(x) for x in layer._flatten_layers()}
    return lambda x: id(x) not in outside and should_quantize_layer(x, filters)


def layer_structure(backbone):
    """What `get_quantization_layer_structure()` of a task returns.

    Read from the graph, so that edits are in it: layers that were inserted
    between the blocks are among them.

    Args:
        backbone: A `CachedBackbone`.

    Returns:
        A dictionary with `pre_block_layers`, a list of one function from token
        ids `(B, T)` to the inputs of the first block, and `sequential_blocks`,
        the layers from the first block to the last.

    Raises:
        ValueError: If a layer between the blocks takes more than what the one
            before it returned, or if a block reads more than that.
    """
    if backbone.roles.source is not None:
        raise ValueError(
            "Expected decoder blocks that read hidden states and nothing else, "
            "for GPTQ and AWQ to quantize them in turn. Received: a "
            f"{type(backbone).__name__}, each of which reads what an encoder "
            'returned, too. Quantize it with mode="int8" or "int4".'
        )
    layers = []
    previous = None
    blocks = sum(site.block is not None for site in backbone.sites)

    def follow(site, *args, **kwargs):
        nonlocal previous, blocks
        x = site(*args, **kwargs)
        if (site.block is not None or layers) and blocks:
            if layers and first_argument(args, kwargs) is not previous:
                raise ValueError(
                    "Expected each layer between the decoder blocks to take "
                    "what the one before it returns, for GPTQ and AWQ to "
                    "quantize them in turn. Received: a backbone with a layer "
                    f"{site.name!r} that takes something else. Quantize it "
                    'before that edit, or with mode="int8" or "int4".'
                )
            if site.block is not None and site.layer.carries:
                raise ValueError(
                    "Expected decoder blocks that read hidden states and "
                    "nothing else, for GPTQ and AWQ to quantize them in turn. "
                    f"Received: {site.name!r}, which reads "
                    f"{', '.join(site.layer.carries)} of the block before, "
                    'too. Quantize it with mode="int8" or "int4".'
                )
            layers.append(site.layer)
            previous = x
            blocks -= site.block is not None
        return x

    backbone.intercepted({"token_ids": np.zeros((1, 2), "int32")}, follow)

    def until_first_block(token_ids):
        def call(site, *args, **kwargs):
            if site.block is not None:
                raise _Stop(first_argument(args, kwargs))
            return site(*args, **kwargs)

        try:
            backbone.intercepted({"token_ids": token_ids}, call)
        except _Stop as stop:
            return stop.x

    return {
        "pre_block_layers": [until_first_block],
        "sequential_blocks": layers,
    }
