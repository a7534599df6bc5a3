"""Llama: rotary positions, grouped-query attention."""

import keras_hub
from keras_hub.src.models.llama import llama_attention
from keras_hub.src.models.llama import llama_decoder
from keras_hub.src.models.llama import llama_rotary_embedding

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.layers.specializing import Specialized

decoder_block(llama_decoder.LlamaTransformerDecoder)


@replaces(llama_attention.LlamaAttention)
class LlamaAttention(CachedAttention, llama_attention.LlamaAttention):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


@replaces(llama_rotary_embedding.LlamaRotaryEmbedding)
class LlamaRotaryEmbedding(
    Specialized, llama_rotary_embedding.LlamaRotaryEmbedding
):
    """Rotary positions that may be scaled, all by the same factor."""

    def _get_inverse_freq(self, rotary_dim):
        # Upstream's overrides the method that would scale them.
        return super()._get_inverse_freq(rotary_dim) / self.scaling_factor


@replaces(keras_hub.models.LlamaBackbone)
class LlamaBackbone(keras_hub.models.LlamaBackbone, CachedBackbone):
    """Llama with a cache in its graph.

    A drop-in replacement for `keras_hub.models.LlamaBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: `rope_position_scaling_factor` scales
    positions. Upstream's has no effect.

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
