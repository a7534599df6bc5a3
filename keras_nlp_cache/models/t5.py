"""T5: relative positions as biases of the logits, which blocks pass on."""

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.t5 import t5_multi_head_attention
from keras_hub.src.models.t5 import t5_transformer_layer

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.seq_2_seq_lm import Seq2SeqLM
from keras_nlp_cache.graph.encoder_decoder import EncoderDecoderBackbone
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers import weight_paths


@replaces(t5_transformer_layer.T5TransformerLayer)
class T5TransformerLayer(DecoderBlock, t5_transformer_layer.T5TransformerLayer):
    """A block of the encoder or of the decoder, whose attention remembers.

    It returns the bias of its logits, too, for the blocks that follow: only the
    first one has an embedding of distances.
    """

    carries = ("position_bias",)
    # Which says so of all that an encoder reads.
    source_mask_argument = "encoder_attention_mask"

    @property
    def activation(self):
        """Function, what the constructor was given, or what stands for it."""
        return self.input_projector.activation

    def build(self, hidden_states_shape):
        """Builds the layers inside, which upstream's does when it is called."""
        attention = [self.self_attention]
        layers = [self.self_attention_layer_norm, self.layer_norm]
        layers.append(self.input_projector)
        if self.is_decoder:
            attention.append(self.cross_attention)
            layers.append(self.cross_attention_layer_norm)
        if self.use_gated_activation:
            layers.append(self.gate_projector)
        for layer in layers:
            layer.build(hidden_states_shape)
        before = hidden_states_shape[:-1]
        self.output_projector.build((*before, self.input_projector.units))
        for layer in attention:
            with weight_paths.scope(layer.name):
                layer.query_projector.build(hidden_states_shape)
                layer.key_projector.build(hidden_states_shape)
                layer.value_projector.build(hidden_states_shape)
                layer.output_projector.build((*before, layer.inner_dim))
            layer.build(hidden_states_shape)
        self.built = True

    def own_parts(self):
        parts = {
            "feedforward": "output_projector",
            "attention": "self_attention_dropout",
            "attention.norm": "self_attention_layer_norm",
            "feedforward.norm": "layer_norm",
            "feedforward.up": "input_projector",
            "feedforward.down": "output_projector",
        }
        if self.use_gated_activation:
            parts["feedforward.gate"] = "input_projector"
            parts["feedforward.up"] = "gate_projector"
        return parts

    def upstream_spec(self, *args, **kwargs):
        x = super().upstream_spec(*args, **kwargs)
        shape = None, self.self_attention.num_heads, x.shape[1], None
        return x, keras.KerasTensor(shape, self.compute_dtype)


@replaces(t5_multi_head_attention.T5MultiHeadAttention)
class T5MultiHeadAttention(
    CachedAttention, t5_multi_head_attention.T5MultiHeadAttention
):
    """Multi-head attention that remembers, but for that of the encoder."""

    scale = 1.0
    merges_heads = True
    dropout_of_weights = "dropout_layer"

    @property
    def remembers(self):
        return self.is_decoder

    @property
    def wants_distance(self):
        return self.use_relative_attention_bias

    @property
    def key_value_shape(self):
        return self.num_heads, self.key_value_dim

    def compute_query_shape(self, input_shape):
        return (*input_shape[:2], *self.key_value_shape)

    def heads(self, name, x):
        x = super().heads(name, x)
        return ops.reshape(x, (*ops.shape(x)[:2], *self.key_value_shape))

    @property
    def logits_bias(self):
        # Of the first block, which hands it on to the others.
        return self._bias_of if self.use_relative_attention_bias else None

    def _bias_of(self, distance):
        buckets = self._relative_position_bucket(
            -distance,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        bias = ops.take(self.relative_attention_bias, buckets, axis=0)
        return ops.cast(ops.transpose(bias, (0, 3, 1, 2)), "float32")

    def answer(self, x, cache, kwargs):
        bias = kwargs.get("position_bias")
        if is_encoded(cache.key):
            output, entry = self.attend_across(x, cache)
            return (output, bias, None), entry
        if bias is None and self.logits_bias is not None:
            bias = self.logits_bias(cache.distance)
        output, entry = self.attend_through(x, cache, bias)
        if block_call.entry_of(self) is None and "position_bias" in kwargs:
            # Blocks of upstream's code follow, which find the mask there.
            bias = cache.mask if bias is None else bias + cache.mask
        return (output, bias, None), entry

    def _all_at_once(self, x, mask=None, position_bias=None, **kwargs):
        if position_bias is not None:
            mask = ops.ones((1, *ops.shape(position_bias)[2:]), "bool")
        return super()._all_at_once(x, mask, kwargs.get("cache"))

    def returned(self, output):
        return output, None, None


@replaces(keras_hub.models.T5Backbone)
class T5Backbone(keras_hub.models.T5Backbone, EncoderDecoderBackbone):
    """T5 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.T5Backbone`: the same arguments,
    weights and files. `EncoderDecoderBackbone` describes what it can be called
    with beyond upstream's inputs.

    Without the first block of the decoder, or of the encoder, the others know
    nothing of how far apart tokens stand.

    Example:

    ```python
    backbone = keras_nlp_cache.models.T5Backbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    outputs, cache = backbone({
        "encoder_token_ids": [[4, 5, 6]],
        "decoder_token_ids": [[0, 1, 2]],
        "cache": cache,
        "cache_update_index": 0,
    })
    ```

    Reference:
        https://arxiv.org/abs/1910.10683
    """


@replaces(keras_hub.models.T5Seq2SeqLM)
class T5Seq2SeqLM(Seq2SeqLM, keras_hub.models.T5Seq2SeqLM):
    """T5 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.T5Seq2SeqLM`. See `Seq2SeqLM`.
    """

    backbone_cls = T5Backbone

    def _logits(self, hidden_states):
        if self.backbone.tie_embedding_weights:
            scale = ops.cast(
                self.backbone.hidden_dim**-0.5, hidden_states.dtype
            )
            hidden_states = ops.multiply(hidden_states, scale)
        return super()._logits(hidden_states)
