"""The calls of which a backbone's graph is made."""

import typing

from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import EncoderBlock
from keras_nlp_cache.blocks.encoder_block import hidden_states_alone
from keras_nlp_cache.cache.shared_inputs import Weightless
from keras_nlp_cache.cache.source_inputs import EncoderOutput


class Site(typing.NamedTuple):
    """One call of one layer in the graph of a backbone.

    Args:
        name: The layer's name, numbered from its second call on.
        layer: The layer, or another Keras operation such as an addition.
        call: int. How often the layer was called before.
        block: int, how many calls of decoder blocks come before, for a decoder
            block. `None` for any other layer.
        shape: Shape of what it returns, without a cache.
        node: What Keras knows of the call.
        encoder_block: int, how many calls of blocks of the encoder come before,
            for one of these. `None` for any other layer.
        in_encoder: bool. Whether it is of what runs once for a text, before the
            decoder.
    """

    name: str
    layer: typing.Any
    call: int
    block: typing.Any
    shape: tuple
    node: typing.Any
    encoder_block: typing.Any = None
    in_encoder: bool = False

    @property
    def is_block(self):
        """Whether it is the call of a block, of the decoder or the encoder."""
        return self.block is not None or self.encoder_block is not None

    def __repr__(self):
        block = "" if self.block is None else f", block {self.block}"
        if self.encoder_block is not None:
            block = f", encoder block {self.encoder_block}"
        kind = type(self.layer).__name__
        return f"Site({self.name}: {kind} -> {self.shape}{block})"

    def __call__(self, *args, **kwargs):
        """Calls the layer. What is tapped inside goes to the collector.

        So does what it returns beside its first output.
        """
        return hidden_states_alone(self.layer(*args, **kwargs))

    def without_entries(self, arguments):
        """The keyword arguments of the call but for the cache."""
        if self.block is None:
            return arguments
        return {k: v for k, v in arguments.items() if k != "entries"}


def sites_of(model):
    """The calls of a backbone, in the order of their execution.

    What stands in for the inputs, positions and masks is left out.
    """
    found, calls, encoder_blocks = [], {}, 0
    order = {id(node): i for i, node in enumerate(model._calls_of_blocks)}
    encoder = _encoder(model)
    # Another layer may have the name that a second call would get.
    taken = {layer.name for layer in model.operations}
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            layer = node.operation
            if node.is_input or isinstance(layer, Weightless):
                continue
            call = calls.get(id(layer), 0)
            calls[id(layer)] = call + 1
            name, number = layer.name, call
            while call and name in taken:
                name = f"{layer.name}_{number}"
                number += 1
            taken.add(name)
            entries, encoder_block = None, None
            if isinstance(layer, DecoderBlock):
                entries = node.arguments.kwargs.get("entries")
            if isinstance(layer, DecoderBlock | EncoderBlock) and not entries:
                encoder_block = encoder_blocks
                encoder_blocks += 1
            found.append(
                Site(
                    name=name,
                    layer=layer,
                    call=call,
                    block=None,
                    shape=tuple(node.outputs[0].shape),
                    node=node,
                    encoder_block=encoder_block,
                    in_encoder=id(node) in encoder,
                )
            )
    # Some that were called may not be needed.
    there = sorted(order[id(x.node)] for x in found if id(x.node) in order)
    return tuple(
        site._replace(block=there.index(order[id(site.node)]))
        if id(site.node) in order
        else site
        for site in found
    )


def _encoder(model):
    """The `id()`s of the nodes that the output of an encoder comes of."""
    found = set()
    nodes = [x for nodes in model._nodes_by_depth.values() for x in nodes]
    tensors = [
        x
        for node in nodes
        if isinstance(node.operation, EncoderOutput)
        for x in node.input_tensors
    ]
    while tensors:
        history = tensors.pop()._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if id(node) not in found:
            found.add(id(node))
            tensors.extend(node.input_tensors)
    return found
