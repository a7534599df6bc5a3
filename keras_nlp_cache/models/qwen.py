"""Qwen 2 and 2.5: rotary positions, biases, grouped queries."""

import keras_hub
from keras_hub.src.models.qwen import qwen_attention
from keras_hub.src.models.qwen import qwen_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(qwen_decoder.QwenTransformerDecoder)


class WindowedAttention(CachedAttention):
    """Attention of the Qwen families, whose window holds everywhere."""

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        cache_update_index=None,
        **kwargs,
    ):
        # Upstream's code, which forgets the window where there is a fused
        # operation.
        if self.window is not None and attention_mask is not None:
            attention_mask = self._mask_sliding_window(
                attention_mask,
                0 if cache_update_index is None else cache_update_index,
            )
        return super()._compute_attention(
            query, key, value, attention_mask, cache_update_index, **kwargs
        )


@replaces(qwen_attention.QwenAttention)
class QwenAttention(WindowedAttention, qwen_attention.QwenAttention):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


@replaces(keras_hub.models.QwenBackbone)
class QwenBackbone(keras_hub.models.QwenBackbone, CachedBackbone):
    """Qwen 2 or 2.5 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.QwenBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: `use_sliding_window_attention` holds on
    all backends. Upstream forgets the window where Keras has fused attention.

    Example:

    ```python
    backbone = keras_nlp_cache.models.QwenBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2407.10671
    """


@replaces(keras_hub.models.QwenCausalLM)
class QwenCausalLM(CausalLM, keras_hub.models.QwenCausalLM):
    """Qwen 2 or 2.5 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.QwenCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = QwenBackbone
