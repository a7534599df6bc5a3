"""Qwen 3: queries and keys are normalized before they are rotated."""

import keras_hub
from keras_hub.src.models.qwen3 import qwen3_attention
from keras_hub.src.models.qwen3 import qwen3_decoder

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.models.qwen import WindowedAttention

decoder_block(qwen3_decoder.Qwen3TransformerDecoder)


@replaces(qwen3_attention.Qwen3Attention)
class Qwen3Attention(WindowedAttention, qwen3_attention.Qwen3Attention):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


def normalize_as_trained(blocks):
    """Gives the norms of queries and keys the epsilon of the others."""
    for block in blocks:
        attention = block._self_attention_layer
        attention.layer_norm_epsilon = block.layer_norm_epsilon
        for norm in (
            attention._query_dense_layer_norm,
            attention._key_dense_layer_norm,
        ):
            norm.epsilon = block.layer_norm_epsilon


@replaces(keras_hub.models.Qwen3Backbone)
class Qwen3Backbone(keras_hub.models.Qwen3Backbone, CachedBackbone):
    """Qwen 3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: `layer_norm_epsilon` holds for queries
    and keys, too, and `sliding_window_size` on all backends. Upstream forgets
    the window where Keras has fused attention, on JAX and PyTorch.

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

    def mend(self):
        normalize_as_trained(self.blocks)


@replaces(keras_hub.models.Qwen3CausalLM)
class Qwen3CausalLM(CausalLM, keras_hub.models.Qwen3CausalLM):
    """Qwen 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Qwen3CausalLM`. See
    `CausalLM`.
    """

    backbone_cls = Qwen3Backbone
