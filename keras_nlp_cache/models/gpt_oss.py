"""gpt-oss: learned sinks, windows, a mixture of experts."""

import keras_hub
from keras_hub.src.models.gpt_oss import gpt_oss_attention
from keras_hub.src.models.gpt_oss import gpt_oss_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(gpt_oss_decoder.GptOssTransformerDecoder)


@replaces(gpt_oss_attention.GptOssAttention)
class GptOssAttention(CachedAttention, gpt_oss_attention.GptOssAttention):
    """Grouped-query attention that remembers, with a sink for each head."""

    dropout_of_heads = "dropout_layer"

    @property
    def sink(self):
        return self.sinks

    @property
    def window(self):
        # Upstream counts the positions before the query's own.
        return self.sliding_window + 1 if self.sliding_window else None


@replaces(keras_hub.models.GptOssBackbone)
class GptOssBackbone(keras_hub.models.GptOssBackbone, CachedBackbone):
    """gpt-oss with a cache in its graph.

    A drop-in replacement for `keras_hub.models.GptOssBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.GptOssBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        num_experts=4, sliding_window=4,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2508.10925
    """


@replaces(keras_hub.models.GptOssCausalLM)
class GptOssCausalLM(CausalLM, keras_hub.models.GptOssCausalLM):
    """gpt-oss that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GptOssCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = GptOssBackbone
