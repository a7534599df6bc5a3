"""Qwen 3: queries and keys are normalized before they are rotated."""

import keras_hub
from keras_hub.src.models.qwen3 import qwen3_attention
from keras_hub.src.models.qwen3 import qwen3_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(qwen3_decoder.Qwen3TransformerDecoder)


@replaces(qwen3_attention.Qwen3Attention)
class Qwen3Attention(CachedAttention, qwen3_attention.Qwen3Attention):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


@replaces(keras_hub.models.Qwen3Backbone)
class Qwen3Backbone(keras_hub.models.Qwen3Backbone, CachedBackbone):
    """Qwen 3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Qwen3Backbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        head_dim=8,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2505.09388
    """


@replaces(keras_hub.models.Qwen3CausalLM)
class Qwen3CausalLM(CausalLM, keras_hub.models.Qwen3CausalLM):
    """Qwen 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Qwen3CausalLM`. See
    `CausalLM`.
    """

    backbone_cls = Qwen3Backbone
