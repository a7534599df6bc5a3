"""SmolLM3: rotary positions in three layers of four, grouped queries."""

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.smollm3 import smollm3_layers

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.rotation import rotated
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(smollm3_layers.SmolLM3DecoderLayer)


@replaces(smollm3_layers.SmolLM3Attention)
class SmolLM3Attention(CachedAttention, smollm3_layers.SmolLM3Attention):
    """Grouped-query attention that remembers."""

    projections = {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
    }

    @property
    def key_value_shape(self):
        return self.num_key_value_heads, self.head_dim

    def compute_query_shape(self, input_shape):
        return (*input_shape[:2], self.num_attention_heads, self.head_dim)

    def project(self, x, positions):
        query, key, value = (
            ops.reshape(
                self.projection(name)(x), (*ops.shape(x)[:2], -1, self.head_dim)
            )
            for name in ("query", "key", "value")
        )
        if self.use_rope:
            frequency = self.rotary_embedding.inv_freq
            query = rotated(query, positions, frequency)
            key = rotated(key, positions, frequency)
        return query, key, value


@replaces(keras_hub.models.SmolLM3Backbone)
class SmolLM3Backbone(keras_hub.models.SmolLM3Backbone, CachedBackbone):
    """SmolLM3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.SmolLM3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: its layers have the `dtype` that is asked
    for, and `enable_lora()` finds their projections. Upstream does not pass the
    one on, and looks for other names.

    Example:

    ```python
    backbone = keras_nlp_cache.models.SmolLM3Backbone(
        vocabulary_size=100, num_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        attention_bias=False, attention_dropout=0.0, mlp_bias=False,
        rope_layer_enabled_list=[True, False],
        layer_types=["full_attention", "full_attention"], rope_theta=10000.0,
        layer_norm_epsilon=1e-6, max_position_embeddings=32,
        partial_rotary_factor=1.0,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://huggingface.co/blog/smollm3
    """

    def __init__(self, *args, dtype=None, **kwargs):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(keras.dtype_policies.get(dtype))
        try:
            super().__init__(*args, dtype=dtype, **kwargs)
        finally:
            keras.config.set_dtype_policy(before)

    def default_lora_layer_names(self):
        return ["q_proj", "v_proj"]


@replaces(keras_hub.models.SmolLM3CausalLM)
class SmolLM3CausalLM(CausalLM, keras_hub.models.SmolLM3CausalLM):
    """SmolLM3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.SmolLM3CausalLM`. See
    `CausalLM`.
    """

    backbone_cls = SmolLM3Backbone
