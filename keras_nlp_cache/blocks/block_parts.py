"""What upstream's decoder blocks call the layers that they are made of.

A family whose block calls one otherwise says so, with `decoder_block()`.
"""

import functools

_NAMES = {
    "attention": ("_self_attention_dropout", "attention_dropout"),
    "attention.norm": (
        "_self_attention_layer_norm",
        "_self_attention_layernorm",
        "pre_attention_norm",
        "pre_attention_layernorm",
        "_pre_attention_layernorm",
        "input_layernorm",
    ),
    "feedforward": (
        "_feedforward_dropout",
        "feedforward_dropout",
        "_sparse_moe_block",
        "sparse_moe_block",
    ),
    "feedforward.norm": (
        "_feedforward_layer_norm",
        "_feedforward_layernorm",
        "pre_ffw_norm",
        "post_attention_layernorm",
        "_post_attention_layernorm",
    ),
    "feedforward.gate": (
        "_feedforward_gate_dense",
        "feedforward_gate_dense",
        "gating_ffw",
        "mlp._feedforward_gate_dense",
        "mlp.gate_proj",
    ),
    "feedforward.up": (
        "_feedforward_intermediate_dense",
        "feedforward_intermediate_dense",
        "gating_ffw_2",
        "dense_h_to_4h",
        "_mlp_intermediate_dense",
        "mlp._feedforward_intermediate_dense",
        "mlp.up_proj",
    ),
    "feedforward.down": (
        "_feedforward_output_dense",
        "feedforward_output_dense",
        "ffw_linear",
        "dense_4h_to_h",
        "_mlp_output_dense",
        "mlp._feedforward_output_dense",
        "mlp.down_proj",
    ),
}


def find_parts(block):
    """The parts of a decoder block, as far as they have usual names.

    Args:
        block: A `DecoderBlock`.

    Returns:
        A dictionary from the names of parts to attributes of the block. A dot
        in these leads into a layer.
    """
    found = {}
    for part, names in _NAMES.items():
        for name in names:
            if _get(block, name) is not None:
                found[part] = name
                break
    # Where nothing follows the last product of a branch, that is its end.
    attention = block.attention_name
    output = getattr(block, attention).projections["output"]
    found.setdefault("attention", f"{attention}.{output}")
    found.setdefault("feedforward", found.get("feedforward.down", "mlp"))
    return found


def _get(layer, path):
    return functools.reduce(
        lambda x, name: getattr(x, name, None), path.split("."), layer
    )
