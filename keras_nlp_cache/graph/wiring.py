"""How a cache is threaded through a graph.

Each layer that remembers in a decoder block that is called through a `Wiring`
gets an entry of its own, as one more pair of inputs, and the graph one more
pair of outputs. Who builds the graph sees blocks that take and return what
upstream's do.
"""

import functools
import inspect

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.shared_inputs import AttentionMask
from keras_nlp_cache.cache.shared_inputs import Distance
from keras_nlp_cache.cache.shared_inputs import Positions
from keras_nlp_cache.cache.state_inputs import RealTokens
from keras_nlp_cache.graph.roles import TEXT
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.block_call import sequence_first


def constant(x):
    """Makes an array of a tensor that was computed for a graph.

    Exported through TensorFlow, the tensor would become one more input.
    """
    if keras.config.backend() == "tensorflow" and ops.is_tensor(x):
        return np.asarray(x.numpy())
    return x


class Wiring:
    """The inputs of one graph, and the caches threaded through it.

    Args:
        dtype: Dtype policy of the layers that it adds to the graph.
        graph: Optional `keras.Function`, a graph without a cache whose inputs
            to take. Defaults to new ones.
        roles: `Roles`, what inputs are called.

    Attributes:
        inputs: Dictionary of the symbolic inputs, but for the caches.
        positions: Symbolic int32 `(B or 1, T)`, for layers that take
            `positions`.
        blocks: The decoder blocks, in the order in which they were called. One
            that was called twice stands there twice.
        calls: What Keras knows of these calls, as nodes.
        windows: For each entry of the cache, how many tokens a query of its
            layer sees, `None` for all.
    """

    def __init__(self, dtype, graph=None, roles=TEXT):
        self._dtype = dtype
        self._graph = graph
        self._roles = roles
        self._caches = []
        self._updated = []
        self.windows = []
        self._masks = {}
        self._distance = self._real = None
        # What the last block was called with.
        self._arguments = {}
        # By the `id()` of what a block returns for others to read, that and
        # what is kept of it.
        self._lent = {}
        self.blocks, self.calls = [], []
        self.inputs = {
            **{name: self._new_input(name) for name in roles.of_upstream},
            "cache_update_index": keras.Input(
                batch_shape=(),
                dtype="int32",
                name="cache_update_index",
                optional=True,
            ),
            "token_positions": keras.Input(
                (None,), dtype="int32", name="token_positions", optional=True
            ),
            "attention_mask": keras.Input(
                (None, None), dtype="bool", name="attention_mask", optional=True
            ),
        }
        if graph is not None:
            given = {x.name: x for x in graph.inputs}
            for name in roles.of_upstream:
                if name != roles.token_ids:
                    given[name]._keras_history.operation.optional = True
            self.inputs.update(given)
        self.positions = self._new_positions()

    def _new_input(self, name):
        """An input that upstream's backbone has, too."""
        return keras.Input(
            (None,),
            dtype="int32",
            name=name,
            optional=name != self._roles.token_ids,
        )

    def _new_positions(self):
        return Positions(dtype=self._dtype, name="positions")(
            self.inputs[self._roles.token_ids],
            index=self.inputs["cache_update_index"],
            token_positions=self.inputs["token_positions"],
            attention_mask=self.inputs["attention_mask"],
        )

    @property
    def roles(self):
        """`Roles`, what inputs are called."""
        return self._roles

    @property
    def generated(self):
        """Symbolic int32 `(B, T)`, for layers that treat prompts otherwise.

        Not 0 where the token that follows is generated. An input of the graph,
        optional, from when it is first asked for.
        """
        if "generated" not in self.inputs:
            self.inputs["generated"] = keras.Input(
                (None,), dtype="int32", name="generated", optional=True
            )
        return self.inputs["generated"]

    def thread(self, takes_positions=()):
        """Threads caches through the graph that the inputs are of.

        The layers are called once more. What they are called with and return
        without a cache stays their first call, which is the one that Keras
        means by `layer.output`.

        Args:
            takes_positions: Layers that take `positions`.

        Returns:
            The symbolic hidden states.
        """

        def call(operation, *args, **kwargs):
            args, kwargs = tree.map_structure(constant, (args, kwargs))
            if operation in takes_positions:
                kwargs["positions"] = self.positions
            if isinstance(operation, DecoderBlock):
                return self.call_block(operation, args, kwargs)
            return self.call_operation(operation, args, kwargs)

        return self._graph._run_through_graph(
            self._graph.inputs,
            operation_fn=lambda operation: functools.partial(call, operation),
        )

    def call_operation(self, operation, args, kwargs):
        """Calls what is no decoder block, as upstream does."""
        return operation(*args, **kwargs)

    def call_block(self, block, args, kwargs):
        """Calls a decoder block, with an entry for each layer that remembers.

        Args:
            block: A `DecoderBlock`.
            args: Its positional arguments, symbolic hidden states first.
            kwargs: Its other arguments, without entries. The padding mask may
                be left out, and what the block before was called with.

        Returns:
            What the block returns without a cache, symbolically.
        """
        args, kwargs = sequence_first(block, args, kwargs)
        kwargs = self._of_signature(block, self._completed_text(kwargs))
        if len(args) < 2 and block.padding_argument is not None:
            kwargs.setdefault(
                block.padding_argument, self.inputs[self._roles.padding_mask]
            )
        if not block.built:
            block.build(first_argument(args, kwargs).shape)
        kwargs["entries"] = entries = tuple(
            self._borrowed(layer, block, kwargs)
            if layer.borrows
            else self._entry(layer)
            for layer in block.remembering()
        )
        outputs, updated, *_ = block(*args, **kwargs)
        x, *further = outputs if isinstance(outputs, tuple) else (outputs,)
        history = x._keras_history
        self.calls.append(history.operation._inbound_nodes[history.node_index])
        self.blocks.append(block)
        self._updated.extend(updated)
        self._note_lent(block, entries, further)
        return outputs

    def _note_lent(self, block, entries, further):
        """Notes what later blocks can read of what a block returned."""
        if block.shared_argument is None:
            return
        shared = further[block.carries.index(block.shared_argument)]
        (layer,), (entry,) = block.remembering(), entries
        if not layer.borrows and not hasattr(layer, "stand_in"):
            self._lent[id(shared)] = shared, entry.key

    def _borrowed(self, layer, block, kwargs):
        """What a layer needs beside the keys and values of another one.

        Args:
            layer: A layer that borrows.
            block: The block that it is in.
            kwargs: What that is called with.
        """
        name = block.shared_argument
        shared = kwargs.get(name)
        if id(shared) not in self._lent:
            raise ValueError(
                f"Expected `{name}` for {block.name!r}, whose attention has no "
                "keys and values of its own, to be those of an earlier block. "
                f"Received: {'none' if shared is None else 'others'}, as after "
                "an edit that removes that block, or puts something in the "
                "place of it or of its attention. Remove the blocks that read "
                "them, too, or leave that one as it is."
            )
        return LayerCache(
            index=self.inputs["cache_update_index"],
            positions=self.positions,
            mask=self._mask(layer, self._lent[id(shared)][1]),
        )

    def _completed_text(self, kwargs):
        """Arguments of a block, with those of the one before it."""
        self._arguments = {**self._arguments, **kwargs}
        return self._arguments

    @staticmethod
    def _of_signature(block, kwargs):
        """Those of the keyword arguments that the block has a name for.

        Some of upstream's backbones pass on to their blocks what they were
        made with, such as a name, which a block that takes anything ignores.
        """
        named = {
            x.name
            for x in inspect.signature(block.call).parameters.values()
            if x.kind is not x.VAR_KEYWORD
        }
        return {name: x for name, x in kwargs.items() if name in named}

    def _new_entry(self, layer):
        """The symbolic key and value of one more entry of the cache."""
        shapes, dtype = layer.state_shapes, "float32"
        if shapes is None:
            heads, head_dim = layer.key_value_shape
            shapes, dtype = [(heads, None, head_dim)] * 2, layer.compute_dtype
        key, value = (
            keras.Input(
                shape,
                dtype=dtype,
                name=f"cache_{len(self._caches)}_{name}",
                optional=True,
            )
            for name, shape in zip(("key", "value"), shapes)
        )
        self._caches.append((key, value))
        self.windows.append(layer.window)
        return key, value

    def _entry(self, layer):
        key, value = self._new_entry(layer)
        if layer.state_shapes is not None:
            return LayerCache(
                key=key,
                value=value,
                index=self.inputs["cache_update_index"],
                positions=self.positions,
                mask=self._real_tokens(),
            )
        return LayerCache(
            key=key,
            value=value,
            index=self.inputs["cache_update_index"],
            positions=self.positions,
            mask=self._mask(layer, key),
            distance=self._slot_distance(key) if layer.wants_distance else None,
        )

    def _real_tokens(self):
        """Which tokens are no padding, for all layers with a state."""
        if self._real is None:
            self._real = RealTokens(dtype=self._dtype, name="real_tokens")(
                self.positions,
                padding_mask=self.inputs[self._roles.padding_mask],
                index=self.inputs["cache_update_index"],
            )
        return self._real

    def _slot_distance(self, key):
        """The distances in all layers that want them."""
        if self._distance is None:
            self._distance = Distance(dtype=self._dtype, name="distance")(
                self.positions,
                padding_mask=self.inputs[self._roles.padding_mask],
                key=key,
                index=self.inputs["cache_update_index"],
                token_positions=self.inputs["token_positions"],
            )
        return self._distance

    def _mask(self, layer, key):
        """The mask of all layers that have a window of this size, or none.

        And that treat spans alike.

        A policy keeps the same tokens in all of these, so that the first one's
        keys tell of all.
        """
        window, sees_spans = layer.window, self._sees_spans(layer)
        kind = window, sees_spans
        if kind not in self._masks:
            name, positions = "mask", None
            if window is not None:
                name = f"mask_of_window_{window}"
                positions = self.inputs["token_positions"]
            if sees_spans:
                name += "_and_spans"
            self._masks[kind] = self._new_mask(
                window,
                sees_spans,
                name,
                padding_mask=self.inputs[self._roles.padding_mask],
                key=key,
                index=self.inputs["cache_update_index"],
                attention_mask=self.inputs["attention_mask"],
                token_positions=positions,
            )
        return self._masks[kind]

    def _sees_spans(self, layer):
        """Whether tokens of a span see each other in a layer."""
        return False

    def _new_mask(self, window, sees_spans, name, **arguments):
        mask = AttentionMask(window, dtype=self._dtype, name=name)
        return mask(self.positions, **arguments)

    def graph(self, hidden_states, *further):
        """The inputs and outputs of the wired graph.

        Args:
            hidden_states: The symbolic hidden states that the graph returns.
            *further: Nested structures of symbolic outputs beside those.

        Returns:
            `(inputs, outputs)`, where `outputs` is `(hidden_states, cache,
            *further)`.
        """
        inputs = {**self.inputs, "cache": tuple(self._caches)}
        return inputs, (hidden_states, tuple(self._updated), *further)
