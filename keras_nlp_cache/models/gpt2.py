"""GPT-2: learned positions, one key/value head per query head."""

import keras_hub

from keras_nlp_cache.attention import CachedAttention
from keras_nlp_cache.backbone import CachedBackbone
from keras_nlp_cache.causal_lm import CausalLM
from keras_nlp_cache.decoder_block import DecoderBlock
from keras_nlp_cache.drop_in import replaces


@replaces(keras_hub.layers.CachedMultiHeadAttention)
class CachedMultiHeadAttention(
    CachedAttention, keras_hub.layers.CachedMultiHeadAttention
):
    """Multi-head attention that takes a per-layer cache."""

    @property
    def key_value_shape(self):
        return self._num_heads, self._key_dim

    @property
    def scale(self):
        return self._key_dim**-0.5

    @property
    def weights_dropout(self):
        return self._dropout_layer if self._dropout else None

    def project(self, x, positions):
        return self._query_dense(x), self._key_dense(x), self._value_dense(x)


@replaces(keras_hub.layers.TransformerDecoder)
class TransformerDecoder(DecoderBlock, keras_hub.layers.TransformerDecoder):
    """Transformer decoder that takes a per-layer cache."""

    attention_cls = CachedMultiHeadAttention
    parts = {
        "attention": "_self_attention_dropout",
        "attention.norm": "_self_attention_layer_norm",
        "feedforward": "_feedforward_dropout",
        "feedforward.down": "_feedforward_output_dense",
        "feedforward.norm": "_feedforward_layer_norm",
        "feedforward.up": "_feedforward_intermediate_dense",
    }

    def build(self, decoder_sequence_shape, encoder_sequence_shape=None):
        super().build(decoder_sequence_shape, encoder_sequence_shape)
        self.specialize_attention()

    def _compute_self_attention_mask(self, **kwargs):
        return self.mask_unless_cached(
            super()._compute_self_attention_mask, **kwargs
        )


@replaces(keras_hub.models.GPT2Backbone)
class GPT2Backbone(keras_hub.models.GPT2Backbone, CachedBackbone):
    """GPT-2 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.GPT2Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.GPT2Backbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
    """

    block_cls = TransformerDecoder
    position_layers = ("position_embedding",)

    @property
    def max_positions(self):
        return self.position_embedding.sequence_length


@replaces(keras_hub.models.GPT2CausalLM)
class GPT2CausalLM(CausalLM, keras_hub.models.GPT2CausalLM):
    """GPT-2 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GPT2CausalLM`. See `CausalLM`.
    """

    backbone_cls = GPT2Backbone
    embeddings_name = "embeddings_add"
