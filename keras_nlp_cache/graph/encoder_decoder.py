"""A backbone whose decoder reads what its encoder returns."""

import itertools

import keras
from keras import ops

from keras_nlp_cache.cache import policies
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.calling import floating_dtype
from keras_nlp_cache.graph.calling import plain_python
from keras_nlp_cache.graph.constructed import learned_positions
from keras_nlp_cache.graph.encoder_wiring import EncoderWiring
from keras_nlp_cache.graph.roles import ENCODER_DECODER
from keras_nlp_cache.graph.source_inputs import check_encoded
from keras_nlp_cache.graph.source_inputs import check_remembered
from keras_nlp_cache.graph.source_inputs import normalize_source
from keras_nlp_cache.quantization.quantizing import floating_policy


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
    def encoder_blocks(self):
        """The blocks of the encoder, in the order in which they are called."""
        return getattr(self, self.encoder_blocks_name)

    def encode(self, token_ids, padding_mask=None):
        """Runs the encoder alone.

        Args:
            token_ids: int `(B, S)`, or what else the encoder reads.
            padding_mask: Optional `(B, S)`, 0 for padding.

        Returns:
            Tensor `(B, S, hidden_dim)`, to be passed as `"encoder_sequence"`.
        """
        return self.encoder_outputs(token_ids, padding_mask)[
            "encoder_sequence_output"
        ]

    def encoder_outputs(self, token_ids, padding_mask=None):
        """What a call returns of the encoder, which runs alone.

        Takes the arguments of `encode()`. What is of the text is `None`.
        """
        roles = self.roles
        given = {roles.source_ids: token_ids, roles.source_mask: padding_mask}
        given = self._normalize_source(given)
        inputs = dict.fromkeys(self._inputs_struct)
        inputs["cache"] = ((None, None),) * len(self.cache_spec)
        outputs, *_ = self._run_through_graph({**inputs, **given})
        return outputs

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

    @staticmethod
    def encoded_length(length):
        """How long that is which the encoder makes of something.

        Args:
            length: int. How long that is, in tokens.
        """
        return length

    @staticmethod
    def hidden_states_of(outputs):
        return outputs["decoder_sequence_output"]

    # === How the graph is made ===

    def _output_of_encoder(self, outputs):
        self._mask_of_source = outputs.get("encoder_attention_mask")
        return outputs["encoder_sequence_output"]

    def _of_the_text(self, layers):
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
        return EncoderWiring(
            floating_policy(self.blocks[0]),
            graph,
            self.roles,
            self._source,
            self._mask_of_source,
            self.input[self.roles.source_ids] if graph is None else None,
        )

    def _set_graph(self, wiring, *args, **kwargs):
        super()._set_graph(wiring, *args, **kwargs)
        self.cache_encoded = tuple(wiring.encoded)
        # Looked for once: they are asked for in every call.
        self._max_positions, self._max_source_positions = (
            learned_positions(
                x.layer for x in self.sites if x.in_encoder == in_encoder
            )
            for in_encoder in (False, True)
        )

    def _set_blocks(self, wiring):
        super()._set_blocks(wiring)
        setattr(self, self.encoder_blocks_name, list(wiring.encoder_blocks))

    # === How it is called ===

    @plain_python
    def make_cache(
        self, batch_size, max_length, dtype=None, policy=None, zeros=ops.zeros
    ):
        """Makes an empty cache, as `CachedBackbone.make_cache()` does.

        Entries of what the encoder returns have no length, until a call reads
        some of that. `max_length` is of the text.
        """
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
        if not isinstance(inputs, dict):
            return super()._normalize(inputs)  # Which explains it.
        text = {k: x for k, x in inputs.items() if k not in roles.of_source}
        text = super()._normalize(text)
        source = self._normalize_source(
            {name: inputs.get(name) for name in roles.of_source},
            text[roles.token_ids].shape[0],
        )
        check_encoded(text["cache"], self.cache_encoded)
        check_remembered(text["cache"], source, roles, self.encoded_length)
        return {**text, **source}

    def _normalize_source(self, inputs, batch=None):
        return normalize_source(
            inputs,
            self.roles,
            batch,
            self._source,
            self._inputs_struct[self.roles.source_ids],
            self.encoded_length,
            self._max_source_positions,
        )

    @property
    def max_positions(self):
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
                length = self.encoded_length(length)
        text = "decoder_sequence_output"
        return {
            name: super(EncoderDecoderBackbone, self)._output_spec(inputs, y)
            if name == text
            else keras.KerasTensor((batch, length, *y.shape[2:]), y.dtype)
            for name, y in x.items()
        }
