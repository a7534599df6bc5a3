"""Mistral: rotary positions, grouped queries, a window in every layer."""

import keras_hub
from keras_hub.src.models.mistral import mistral_attention
from keras_hub.src.models.mistral import mistral_transformer_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(mistral_transformer_decoder.MistralTransformerDecoder)


@replaces(mistral_attention.CachedMistralAttention)
class CachedMistralAttention(
    CachedAttention, mistral_attention.CachedMistralAttention
):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


@replaces(keras_hub.models.MistralBackbone)
class MistralBackbone(keras_hub.models.MistralBackbone, CachedBackbone):
    """Mistral with a cache in its graph.

    A drop-in replacement for `keras_hub.models.MistralBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.MistralBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        sliding_window=4,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2310.06825
    """


@replaces(keras_hub.models.MistralCausalLM)
class MistralCausalLM(CausalLM, keras_hub.models.MistralCausalLM):
    """Mistral that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.MistralCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = MistralBackbone
