"""What a backbone looks for in the layers that upstream's constructor built."""

import keras
import keras_hub

from keras_nlp_cache.blocks.decoder_block import DecoderBlock


def check_graph(backbone, inputs, outputs):
    """Raises a `ValueError` for a graph that is not one from text to states.

    Args:
        backbone: The backbone that upstream constructs.
        inputs: What upstream's graph takes.
        outputs: What it returns.
    """
    expected = set(backbone.roles.of_upstream)
    received = None
    if not isinstance(inputs, dict) or set(inputs) != expected:
        received = f"inputs {sorted(inputs)}"
    elif isinstance(outputs, dict) and backbone.roles.source is not None:
        return
    elif not isinstance(outputs, keras.KerasTensor):
        received = f"outputs {sorted(outputs)}"
    if received:
        raise ValueError(
            f"Expected a {type(backbone).__name__!r} that takes "
            f"{sorted(expected)} and returns hidden states, which is what this "
            f"package gives a cache. Received one with {received}. Models of "
            "embeddings are keras_hub's."
        )


def check_blocks(backbone):
    """Raises a `ValueError` if a block would not remember what it is told.

    Args:
        backbone: A backbone whose layers have been specialized.
    """
    for block in backbone.blocks:
        if not isinstance(block, DecoderBlock):
            received = f"one of class {type(block).__name__!r}"
        elif not block.remembering():
            inside = sorted(
                {
                    type(layer).__name__
                    for layer in block._flatten_layers(include_self=False)
                }
            )
            received = (
                f"block {block.name!r}, in which no layer does. It is made of "
                f"{inside}"
            )
        else:
            continue
        raise ValueError(
            f"Expected each of `{backbone.blocks_name}` of a "
            f"{type(backbone).__name__!r} to be a decoder block that this "
            "package knows, with a layer that remembers, such as attention. "
            f"Received: {received}. The class in keras_hub is another one than "
            "this package was written for, or a subclass: its module in "
            "`keras_nlp_cache/models/` has to name the classes of block and "
            "attention."
        )


def return_hidden_states_alone(blocks):
    """Has decoder blocks with experts return nothing of how they chose.

    With `output_router_logits`, upstream's return that, too. Its graph goes on
    with the hidden states alone, and nothing else can.
    """
    for block in blocks:
        if getattr(block, "output_router_logits", False):
            block.output_router_logits = False


def positioned_layers(layers):
    """The layers that are to be told where tokens stand.

    Args:
        layers: Those of a backbone's graph.

    Returns:
        A list of those, other than decoder blocks, whose `call()` takes
        `positions`.

    Raises:
        ValueError: If there are learned positions that cannot be told so.
    """
    found = [
        layer
        for layer in layers
        if "positions" in getattr(layer, "call_signature_parameters", ())
        and not isinstance(layer, DecoderBlock)
    ]
    for layer in layers:
        if layer not in found and learned_positions([layer]) is not None:
            raise ValueError(
                "Expected a layer with learned positions to take `positions` "
                f"in its call. Received: {layer.name!r}, of class "
                f"{type(layer).__name__!r}, whose call takes "
                f"{layer.call_signature_parameters}. With a cache it would "
                "take each token for the first."
            )
    return found


def learned_positions(layers):
    """How many positions the layers have an embedding for, `None` if any."""
    for layer in layers:
        if isinstance(layer, keras.layers.Layer):
            for inner in layer._flatten_layers():
                if isinstance(inner, keras_hub.layers.PositionEmbedding):
                    return inner.sequence_length
    return None
