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


@replaces(t5_transformer_layer.T5TransformerLayer)
class T5TransformerLayer(DecoderBlock, t5_transformer_layer.T5TransformerLayer):
    """A block of the encoder or of the decoder, whose attention remembers.

    It returns the bias of its logits, too, for the blocks that follow: only the
    first one has an embedding of distances.
    """

    carries = ("position_bias",)

    def own_parts(self):
        parts = {
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

    def logits_bias(self, distance):
        """Of how many positions each slot is behind each token."""
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
        else:
            if bias is None and self.use_relative_attention_bias:
                bias = self.logits_bias(cache.distance)
            output, entry = self.attend_through(x, cache, bias)
        return (output, bias, None), entry

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
