"""Gemma 1 and 2: rotary positions, soft caps, sliding windows."""

import keras
import keras_hub
from keras_hub.src.models.gemma import gemma_attention
from keras_hub.src.models.gemma import gemma_decoder_block
from keras_hub.src.models.gemma import rms_normalization

from keras_nlp_cache.attention import CachedAttention
from keras_nlp_cache.backbone import CachedBackbone
from keras_nlp_cache.causal_lm import CausalLM
from keras_nlp_cache.decoder_block import DecoderBlock
from keras_nlp_cache.decoder_block import specialize
from keras_nlp_cache.drop_in import replaces


@replaces(gemma_attention.CachedGemmaAttention)
class CachedGemmaAttention(
    CachedAttention, gemma_attention.CachedGemmaAttention
):
    """Grouped-query attention that takes a per-layer cache."""

    projections = {
        "query": "query_dense",
        "key": "key_dense",
        "value": "value_dense",
        "output": "output_dense",
    }

    @property
    def key_value_shape(self):
        return self.num_key_value_heads, self.head_dim

    @property
    def scale(self):
        if self.query_head_dim_normalize:
            return self.head_dim**-0.5
        return (self.hidden_dim // self.num_query_heads) ** -0.5

    @property
    def soft_cap(self):
        return self.logit_soft_cap

    @property
    def window(self):
        if self.use_sliding_window_attention:
            return self.sliding_window_size
        return None

    @property
    def weights_dropout(self):
        return self.dropout_layer if self.dropout else None

    def project(self, x, positions):
        return (
            self._apply_rope(self.query_dense(x), 0, positions=positions),
            self._apply_rope(self.key_dense(x), 0, positions=positions),
            self.value_dense(x),
        )


@replaces(rms_normalization.RMSNormalization)
class RMSNormalization(rms_normalization.RMSNormalization):
    """A norm with a config, for surgery to put it elsewhere and save it there.

    Upstream's has none as soon as it is made with a dtype policy.
    """

    def get_config(self):
        return {**keras.layers.Layer.get_config(self), "epsilon": self.epsilon}


@replaces(gemma_decoder_block.GemmaDecoderBlock)
class GemmaDecoderBlock(DecoderBlock, gemma_decoder_block.GemmaDecoderBlock):
    """Gemma decoder block that takes a per-layer cache."""

    cache_argument = "cache"
    padding_argument = "padding_mask"
    attention_name = "attention"
    attention_cls = CachedGemmaAttention

    @property
    def parts(self):
        parts = {
            "attention": "attention.output_dense",
            "attention.norm": "pre_attention_norm",
            "feedforward": "ffw_linear",
            "feedforward.down": "ffw_linear",
            "feedforward.gate": "gating_ffw",
            "feedforward.norm": "pre_ffw_norm",
            "feedforward.up": "gating_ffw_2",
        }
        if self.use_post_attention_norm:
            parts["attention.post_norm"] = "post_attention_norm"
            parts["attention"] = "post_attention_norm"
        if self.dropout:
            parts["attention"] = "attention_dropout"
        if self.use_post_ffw_norm:
            parts["feedforward.post_norm"] = "post_ffw_norm"
            parts["feedforward"] = "post_ffw_norm"
        return parts

    def build(self, input_shape):
        super().build(input_shape)
        self.specialize_attention()

    def specialize_attention(self):
        super().specialize_attention()
        for name, part in self.parts.items():
            if name.endswith("norm"):
                specialize(getattr(self, part), RMSNormalization)

    def _compute_attention_mask(
        self, x, padding_mask, cache, cache_update_index
    ):
        return self.mask_unless_cached(
            super()._compute_attention_mask,
            x=x,
            padding_mask=padding_mask,
            cache=cache,
            cache_update_index=cache_update_index,
        )


@replaces(keras_hub.models.GemmaBackbone)
class GemmaBackbone(keras_hub.models.GemmaBackbone, CachedBackbone):
    """Gemma 1 or 2 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.GemmaBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.GemmaBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64, head_dim=8,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118
    """

    block_cls = GemmaDecoderBlock
    layer_classes = {"layer_norm": RMSNormalization}


@replaces(keras_hub.models.GemmaCausalLM)
class GemmaCausalLM(CausalLM, keras_hub.models.GemmaCausalLM):
    """Gemma 1 or 2 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GemmaCausalLM`. See `CausalLM`.
    """

    backbone_cls = GemmaBackbone
