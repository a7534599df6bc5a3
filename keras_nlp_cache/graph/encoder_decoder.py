"""A backbone whose decoder reads what its encoder returns."""

import functools
import itertools

import keras
from keras import ops

from keras_nlp_cache.blocks.decoder_block import SOURCES
from keras_nlp_cache.cache import policies
from keras_nlp_cache.cache.source_inputs import EncoderOutput
from keras_nlp_cache.cache.source_inputs import JoinedSource
from keras_nlp_cache.cache.source_inputs import SourceMask
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.calling import floating_dtype
from keras_nlp_cache.graph.calling import plain_python
from keras_nlp_cache.graph.constructed import learned_positions
from keras_nlp_cache.graph.constructed import nodes_of
from keras_nlp_cache.graph.encoder_wiring import EncoderWiring
from keras_nlp_cache.graph.roles import ENCODER_DECODER
from keras_nlp_cache.graph.source_inputs import check_encoded
from keras_nlp_cache.graph.source_inputs import check_remembered
from keras_nlp_cache.graph.source_inputs import normalize_source
from keras_nlp_cache.quantization.quantizing import floating_policy

# Where decoder blocks begin to read.
_ENDS_OF_ENCODER = EncoderOutput, SourceMask


class EncoderDecoderBackbone(CachedBackbone):
    """Base of backbones with an encoder: one graph, of which parts can run.

    Three calls are possible, by what is passed:

    - with `"encoder_token_ids"`, all of the graph runs. Where an encoder reads
      something else, that is called as upstream calls it,
    - with `"encoder_sequence"` in their place, only the decoder does,
    - with neither, and with a cache of an earlier call, only the decoder does,
      and reads of the encoder what is in the cache.

    A cache has entries for both attention layers of each decoder block. Those
    of what the encoder returned are written by a call that is given that, in
    its length, and are only read after.

    Attributes:
        encoder_blocks_name: Name of the attribute that lists the blocks of the
            encoder.

    Call arguments:
        inputs: A dictionary. Only `"decoder_token_ids"` is always required.
            Beyond what `CachedBackbone` takes, where `"decoder_token_ids"` and
            `"decoder_padding_mask"` are the text:

            - `"encoder_token_ids"`: int, `(B, S)`.
            - `"encoder_padding_mask"`: bool or int, `(B, S)`, 0 for padding.
              Goes with one of the others. Defaults to no padding.
            - `"encoder_sequence"`: `(B, S, hidden_dim)`, what `encode()`
              returns.
            - What else the encoder reads, by the names that upstream has for
              it, with `"encoder_token_ids"`.

    Returns:
        As upstream, a dictionary of `"encoder_sequence_output"` and
        `"decoder_sequence_output"`. With a cache, a pair of that and the
        updated cache. What was not computed is `None`.

    Example:
    ```python
    backbone = BartBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    outputs, cache = backbone({
        "encoder_token_ids": [[5, 6, 7]],
        "decoder_token_ids": [[1, 2]],
        "cache": cache,
        "cache_update_index": 0,
    })
    outputs, cache = backbone({
        "decoder_token_ids": [[3]], "cache": cache, "cache_update_index": 2,
    })
    outputs["decoder_sequence_output"]  # (1, 1, 32)
    ```
    """

    roles = ENCODER_DECODER
    encoder_blocks_name = "encoder_transformer_layers"
    blocks_name = "decoder_transformer_layers"

    @property
    def has_encoder(self):
        """Whether there is one, which an instance of a class may lack."""
        return self.roles.source is not None

    @property
    def encoder_blocks(self):
        """The blocks of the encoder, in the order in which they are called."""
        return getattr(self, self.encoder_blocks_name)

    @property
    def prefill_layers(self):
        """The layers that no decode step calls."""
        found = {}
        for site in self.sites:
            inside = getattr(site.layer, "_flatten_layers", list)()
            found.setdefault(site.in_encoder, {}).update(
                {id(x): x for x in inside}
            )
        of_text = found.get(False, {})
        return [x for k, x in found.get(True, {}).items() if k not in of_text]

    def encode(self, token_ids, padding_mask=None, **beside):
        """Runs the encoder alone.

        Args:
            token_ids: int `(B, S)`, or what else the encoder reads.
            padding_mask: Optional `(B, S)`, 0 for padding.
            **beside: What the encoder reads beside that, by the names that the
                backbone has for it.

        Returns:
            Tensor `(B, S, hidden_dim)`, to be passed as `"encoder_sequence"`.
            It is as long as what there is beside, too.
        """
        return self.encoded(token_ids, padding_mask, **beside)[0]

    def encoded(self, token_ids, padding_mask=None, **beside):
        """Runs the encoder alone, and says what of it is padding.

        Takes the arguments of `encode()`.

        Returns:
            `(sequence, mask)`: what that returns, and which of it is padding,
            as decoder blocks are told it, `(B, S)` or `(B, 1, S)`.
        """
        roles = self.roles
        given = {roles.source_ids: token_ids, roles.source_mask: padding_mask}
        given = self._normalize_source({**given, **beside})
        given = {**dict.fromkeys(self._inputs_struct), **given}
        given["cache"] = ((None, None),) * len(self.cache_spec)
        (output, *_), (mask, *_) = map(self.nodes_of_kind, _ENDS_OF_ENCODER)
        return self.values_of(
            (output.outputs[0], mask.arguments.kwargs["padding_mask"]), given
        )

    def anything_to_read(self, rows):
        """Inputs of the encoder that are as good as others.

        Args:
            rows: int. The rows of a batch.
        """
        roles = self.roles
        length = next(
            x for x in itertools.count(2) if self.encoded_length(x) > 1
        )
        reads = self._inputs_struct[roles.source_ids]
        shape = rows, length, *reads.shape[2:]
        return {
            roles.source_ids: ops.ones(shape, reads.dtype),
            roles.source_mask: ops.ones(shape[:2], "int32"),
        }

    def encoded_length(self, length, beside=None):
        """How long that is which the encoder makes of something.

        Args:
            length: int. How long that is, in tokens.
            beside: Optional dictionary of what it reads beside that.
        """
        return length

    @staticmethod
    def hidden_states_of(outputs):
        if not isinstance(outputs, dict):
            return outputs
        return outputs["decoder_sequence_output"]

    # === How the graph is made ===

    def _output_of_encoder(self, outputs):
        if not self.has_encoder:
            return super()._output_of_encoder(outputs)
        if not isinstance(outputs, dict):
            # It is what the first block of the decoder reads.
            first, *_ = nodes_of(outputs)[self.blocks[0]]
            given = first.arguments.kwargs
            return next(given[name] for name in SOURCES if name in given)
        self._mask_of_source = outputs.get("encoder_attention_mask")
        return outputs["encoder_sequence_output"]

    def _of_the_text(self, layers):
        if not self.has_encoder:
            return super()._of_the_text(layers)
        encoder = keras.Function(
            self._source_inputs_of(self._source), self._source
        )
        return [x for x in layers if x not in encoder.operations]

    @staticmethod
    def _source_inputs_of(tensor):
        """The symbolic inputs that a tensor comes of."""
        found, tensors = [], [tensor]
        while tensors:
            x = tensors.pop()
            history = x._keras_history
            node = history.operation._inbound_nodes[history.node_index]
            if node.is_input and not any(x is y for y in found):
                found.append(x)
            tensors.extend(node.input_tensors)
        return found

    def new_wiring(self, graph=None):
        if not self.has_encoder:
            return super().new_wiring(graph)
        roles, reads = self.roles, None
        if graph is None:
            names = roles.source_ids, *roles.beside_source
            reads = {name: self.input[name] for name in names}
        return EncoderWiring(
            floating_policy(self.blocks[0]),
            graph,
            roles,
            self._source,
            self._mask_of_source,
            reads,
        )

    def _set_graph(self, wiring, *args, **kwargs):
        super()._set_graph(wiring, *args, **kwargs)
        if not self.has_encoder:
            return
        self.cache_encoded = tuple(wiring.encoded)
        self._joins = _joins(self.sites)
        # Looked for once: they are asked for in every call.
        self._max_positions, self._max_source_positions = (
            learned_positions(
                x.layer for x in self.sites if x.in_encoder == in_encoder
            )
            for in_encoder in (False, True)
        )

    def with_graph(self, *args, **kwargs):
        new = super().with_graph(*args, **kwargs)
        if self.has_encoder:
            self._check_joins(new)
        return new

    def _check_joins(self, edited):
        """Raises a `ValueError` if text alone would not go through an edit."""
        expected, received = self._joins, edited._joins
        if received == expected:
            return
        raise ValueError(
            "Expected an edit that leaves in the graph "
            f"{' and '.join(f'{x!r} after {y}' for x, y in expected)}, where "
            "a text goes on alone if the encoder reads nothing beside it. "
            "Received: "
            f"{' and '.join(f'{x!r} after {y}' for x, y in received) or None}. "
            "Insert layers after these."
        )

    def _set_blocks(self, wiring):
        super()._set_blocks(wiring)
        if self.has_encoder:
            blocks = list(wiring.encoder_blocks)
            setattr(self, self.encoder_blocks_name, blocks)

    # === How it is called ===

    @plain_python
    def make_cache(
        self, batch_size, max_length, dtype=None, policy=None, zeros=ops.zeros
    ):
        """Makes an empty cache, as `CachedBackbone.make_cache()` does.

        Entries of what the encoder returns have no length, until a call reads
        some of that. `max_length` is of the text.
        """
        if not self.has_encoder:
            return super().make_cache(
                batch_size, max_length, dtype, policy, zeros
            )
        self.check_cache_size(batch_size, max_length)
        dtype = floating_dtype("dtype", dtype or self.compute_dtype)
        policy = policies.get(policy)
        policy.check(self)

        def make(heads, dim, window, is_encoded):
            if is_encoded:
                shape = batch_size, heads, 0, dim
                return policy.make_encoded(shape, dtype, zeros)
            shape = batch_size, heads, max_length, dim
            return policy.make(shape, dtype, window, zeros)

        return tuple(
            tuple(make(*spec, window, is_encoded) for _ in range(2))
            for spec, window, is_encoded in zip(
                self.cache_spec,
                self.cache_windows,
                self.cache_encoded,
                strict=True,
            )
        )

    def _normalize(self, inputs):
        roles = self.roles
        if not self.has_encoder or not isinstance(inputs, dict):
            return super()._normalize(inputs)  # Which explains it.
        text = {k: x for k, x in inputs.items() if k not in roles.of_source}
        text = super()._normalize(text)
        source = self._normalize_source(
            {name: inputs.get(name) for name in roles.of_source},
            text[roles.token_ids].shape[0],
        )
        check_encoded(text["cache"], self.cache_encoded)
        length_of = functools.partial(self.encoded_length, beside=source)
        check_remembered(text["cache"], source, roles, length_of)
        return {**text, **source}

    def _normalize_source(self, inputs, batch=None):
        return normalize_source(
            inputs,
            self.roles,
            batch,
            self._source,
            self._inputs_struct,
            self.encoded_length,
            self._max_source_positions,
        )

    @property
    def max_positions(self):
        if not self.has_encoder:
            return super().max_positions
        return self._max_positions

    def _output_spec(self, inputs, x):
        if not isinstance(x, dict):
            return super()._output_spec(inputs, x)
        roles = self.roles
        source = inputs[roles.source]
        if source is not None:
            batch, length = source.shape[:2]
        else:
            batch, length = inputs[roles.source_ids].shape[:2]
            if length is not None:
                length = self.encoded_length(length, inputs)
        text = "decoder_sequence_output"
        return {
            name: super(EncoderDecoderBackbone, self)._output_spec(inputs, y)
            if name == text
            else keras.KerasTensor((batch, length, *y.shape[2:]), y.dtype)
            for name, y in x.items()
        }


def _joins(sites):
    """Where a text is joined with something else, and by what kind of layer."""
    joins = [x for x in sites if type(x.layer) is JoinedSource]
    before = [x.node.input_tensors[0]._keras_history.operation for x in joins]
    return tuple(
        sorted((x.name, type(y).__name__) for x, y in zip(joins, before))
    )
