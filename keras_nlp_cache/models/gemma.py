"""Gemma 1 and 2: rotary positions, soft caps, sliding windows."""

import keras_hub
from keras_hub.src.models.gemma import gemma_attention
from keras_hub.src.models.gemma import gemma_decoder_block

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone


class GemmaAttention(CachedAttention):
    """What the attention of Gemma 1, 2 and 3 has in common."""

    dropout_of_weights = "dropout_layer"

    @property
    def scale(self):
        if self.query_head_dim_normalize:
            return self.head_dim**-0.5
        return (self.hidden_dim // self.num_query_heads) ** -0.5


@replaces(gemma_attention.CachedGemmaAttention)
class CachedGemmaAttention(
    GemmaAttention, gemma_attention.CachedGemmaAttention
):
    """Grouped-query attention that remembers."""

    def rotate(self, x, positions):
        return self._apply_rope(x, 0, positions=positions)


def scale_as_trained(blocks):
    """Tells attention how to scale, which upstream's blocks do not pass on."""
    for block in blocks:
        normalize = block.query_head_dim_normalize
        block.attention.query_head_dim_normalize = normalize


def gemma_parts(block):
    """What the blocks of Gemma 1, 2 and 3 call what they are made of."""
    parts = {}
    if block.use_post_attention_norm:
        parts["attention.post_norm"] = "post_attention_norm"
        parts["attention"] = "post_attention_norm"
    if block.dropout:
        parts["attention"] = "attention_dropout"
    if block.use_post_ffw_norm:
        parts["feedforward.post_norm"] = "post_ffw_norm"
        parts["feedforward"] = "post_ffw_norm"
    return parts


decoder_block(gemma_decoder_block.GemmaDecoderBlock, gemma_parts)


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

    Differs from upstream, on purpose: with `query_head_dim_normalize=False`, as
    in Gemma 2 27B, logits are scaled as the model was trained, and as that
    argument says. Upstream does not pass it on.

    Reference:
        https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118
    """

    def mend(self):
        scale_as_trained(self.blocks)


@replaces(keras_hub.models.GemmaCausalLM)
class GemmaCausalLM(CausalLM, keras_hub.models.GemmaCausalLM):
    """Gemma 1 or 2 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GemmaCausalLM`. See `CausalLM`.
    """

    backbone_cls = GemmaBackbone
