"""What a backbone looks for in the layers that upstream's constructor built."""

import keras
import keras_hub
from keras import tree
from keras.src.ops.node import KerasHistory

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


def inlined(outputs):
    """What a graph returns, without the model that it ends with.

    The layers inside are called in its place, as the model calls them. These
    become their first calls, which are those that Keras means by
    `layer.output`.

    Args:
        outputs: What a functional model returned, symbolically.
    """
    node = _node_of(outputs)
    model, (inputs,) = node.operation, node.arguments.args
    outputs = model._run_through_graph(inputs, lambda operation: operation)
    found = nodes_of(outputs)
    for operation in found.keys() & set(model.operations):
        nodes, calls = found[operation], operation._inbound_nodes
        # No `sort()`, which the list that TensorFlow tracks has not.
        calls[:] = sorted(calls, key=lambda x: x not in nodes)
        for i, node in enumerate(calls):
            for j, x in enumerate(node.outputs):
                x._keras_history = KerasHistory(operation, i, j)
    return outputs


def nodes_of(outputs):
    """The calls that a graph is made of.

    Args:
        outputs: Nested structure of symbolic tensors.

    Returns:
        A dictionary from operations to lists of their nodes, in order.
    """
    found, tensors = {}, tree.flatten(outputs)
    while tensors:
        node = _node_of(tensors.pop())
        nodes = found.setdefault(node.operation, [])
        if node not in nodes:
            nodes.append(node)
            tensors.extend(node.input_tensors)
    return {
        operation: [x for x in operation._inbound_nodes if x in nodes]
        for operation, nodes in found.items()
    }


def comes_of(tensor, source):
    """Whether a symbolic tensor was computed of another one, or is that."""
    tensors, seen = [tensor], set()
    while tensors:
        x = tensors.pop()
        if x is source:
            return True
        node = _node_of(x)
        if node not in seen:
            seen.add(node)
            tensors.extend(node.input_tensors)
    return False


def _node_of(tensor):
    """The call that returned a symbolic tensor."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def learned_positions(layers):
    """How many positions the layers have an embedding for, `None` if any."""
    for layer in layers:
        if isinstance(layer, keras.layers.Layer):
            for inner in layer._flatten_layers():
                if isinstance(inner, keras_hub.layers.PositionEmbedding):
                    return inner.sequence_length
    return None
