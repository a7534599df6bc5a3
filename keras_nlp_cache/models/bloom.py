"""BLOOM: ALiBi in place of positions."""

import keras_hub
from keras_hub.src.models.bloom import bloom_attention
from keras_hub.src.models.bloom import bloom_decoder

from keras_nlp_cache.attention.alibi import alibi_bias
from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(
    bloom_decoder.BloomDecoder, lambda block: {"feedforward": "_dropout_layer"}
)


@replaces(bloom_attention.BloomAttention)
class BloomAttention(CachedAttention, bloom_attention.BloomAttention):
    """Multi-head attention that remembers."""

    merges_heads = True
    dropout_of_weights = "_dropout_layer"
    logits_bias = alibi_bias
    wants_distance = True

    @property
    def drops_output(self):
        return bool(self._dropout_layer.rate)

    def on_specialized(self):
        super().on_specialized()
        # Upstream builds it when it first attends, though there is nothing to
        # build, and Keras does not quantize a model with a layer that is not.
        self._alibi_layer.built = True

    def merge_heads(self, x):
        return self._dropout_layer(super().merge_heads(x))


@replaces(keras_hub.models.BloomBackbone)
class BloomBackbone(keras_hub.models.BloomBackbone, CachedBackbone):
    """BLOOM with a cache in its graph.

    A drop-in replacement for `keras_hub.models.BloomBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.BloomBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2211.05100
    """


@replaces(keras_hub.models.BloomCausalLM)
class BloomCausalLM(CausalLM, keras_hub.models.BloomCausalLM):
    """BLOOM that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.BloomCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = BloomBackbone
    embeddings_name = "embeddings_layer_norm"
