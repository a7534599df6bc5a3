"""Llama: rotary positions, grouped-query attention."""

import inspect

import keras
import keras_hub
from keras_hub.src.models.llama import llama_attention
from keras_hub.src.models.llama import llama_decoder

from keras_nlp_cache.attention import CachedAttention
from keras_nlp_cache.backbone import CachedBackbone
from keras_nlp_cache.causal_lm import CausalLM
from keras_nlp_cache.decoder_block import DecoderBlock
from keras_nlp_cache.drop_in import replaces


@replaces(llama_attention.LlamaAttention)
class LlamaAttention(CachedAttention, llama_attention.LlamaAttention):
    """Grouped-query attention that takes a per-layer cache."""

    @property
    def key_value_shape(self):
        return self._key_dense.compute_output_shape((None, None, None))[2:]

    @property
    def scale(self):
        return self._inv_norm_factor

    def project(self, x, positions):
        rotate = self.rotary_embedding_layer
        return (
            rotate(self._query_dense(x), positions=positions),
            rotate(self._key_dense(x), positions=positions),
            self._value_dense(x),
        )

    def merge_heads(self, x):
        return super().merge_heads(self._dropout_layer(x))


@replaces(llama_decoder.LlamaTransformerDecoder)
class LlamaTransformerDecoder(
    DecoderBlock, llama_decoder.LlamaTransformerDecoder
):
    """Llama decoder block that takes a per-layer cache."""

    attention_cls = LlamaAttention
    parts = {
        "attention": "_self_attention_dropout",
        "attention.norm": "_self_attention_layernorm",
        "feedforward": "_feedforward_output_dense",
        "feedforward.down": "_feedforward_output_dense",
        "feedforward.gate": "_feedforward_gate_dense",
        "feedforward.norm": "_feedforward_layernorm",
        "feedforward.up": "_feedforward_intermediate_dense",
    }

    def build(self, decoder_sequence_shape):
        super().build(decoder_sequence_shape)
        self.specialize_attention()

    def _compute_self_attention_mask(self, **kwargs):
        return self.mask_unless_cached(
            super()._compute_self_attention_mask, **kwargs
        )

    def get_config(self):
        # Upstream's reads an attribute that does not exist
        # (`rope_scaling_factor`), so its Llama blocks cannot be cloned.
        config = keras.layers.Layer.get_config(self)
        upstream = inspect.signature(llama_decoder.LlamaTransformerDecoder)
        for name, parameter in upstream.parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                config[name] = getattr(self, name)
        config["activation"] = keras.activations.serialize(self.activation)
        config["kernel_initializer"] = keras.initializers.serialize(
            self.kernel_initializer
        )
        return config


@replaces(keras_hub.models.LlamaBackbone)
class LlamaBackbone(keras_hub.models.LlamaBackbone, CachedBackbone):
    """Llama with a cache in its graph.

    A drop-in replacement for `keras_hub.models.LlamaBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.LlamaBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2307.09288
    """

    block_cls = LlamaTransformerDecoder

    def get_config(self):
        # Upstream's forgets whether the embeddings are tied, and with it how
        # to read its own weights back.
        config = super().get_config()
        config["tie_word_embeddings"] = self.tie_word_embeddings
        return config


@replaces(keras_hub.models.LlamaCausalLM)
class LlamaCausalLM(CausalLM, keras_hub.models.LlamaCausalLM):
    """Llama that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.LlamaCausalLM`. See `CausalLM`.
    """

    backbone_cls = LlamaBackbone
