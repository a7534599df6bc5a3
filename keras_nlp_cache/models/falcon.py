"""Falcon, the one of 1B: ALiBi in place of positions."""

import keras_hub
from keras_hub.src.models.falcon import falcon_attention
from keras_hub.src.models.falcon import falcon_transformer_decoder

from keras_nlp_cache.attention.alibi import alibi_bias
from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(falcon_transformer_decoder.FalconTransformerDecoder)


@replaces(falcon_attention.FalconAttention)
class FalconAttention(CachedAttention, falcon_attention.FalconAttention):
    """Multi-head attention that remembers."""

    merges_heads = True
    dropout_of_weights = "attention_dropout"
    wants_distance = True

    def logits_bias(self, distance):
        # Upstream scales it together with the logits.
        return self.scale * alibi_bias(self, distance)


@replaces(keras_hub.models.FalconBackbone)
class FalconBackbone(keras_hub.models.FalconBackbone, CachedBackbone):
    """Falcon with a cache in its graph.

    A drop-in replacement for `keras_hub.models.FalconBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: `layer_norm_epsilon` holds in all blocks.
    Upstream does not pass it on.

    Example:

    ```python
    backbone = keras_nlp_cache.models.FalconBackbone(
        vocabulary_size=100, num_layers=2, num_attention_heads=4,
        hidden_dim=32, intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2306.01116
    """

    def mend(self):
        for block in self.blocks:
            block.layer_norm_epsilon = self.final_layernorm.epsilon
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.epsilon = self.final_layernorm.epsilon


@replaces(keras_hub.models.FalconCausalLM)
class FalconCausalLM(CausalLM, keras_hub.models.FalconCausalLM):
    """Falcon that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.FalconCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = FalconBackbone
