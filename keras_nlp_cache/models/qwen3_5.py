"""Qwen 3.5: of four layers, three keep a state, and one keys and values."""

import keras_hub
from keras import ops
from keras_hub.src.models.qwen3_5 import qwen3_5_attention
from keras_hub.src.models.qwen3_5 import qwen3_5_decoder
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.recurrent import Recurrent
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(qwen3_5_decoder.Qwen3_5TransformerDecoder)

# What closes a gate. Of it, half precision still has a number.
_SHUT = -1e4


@replaces(qwen3_5_attention.Qwen3_5Attention)
class Qwen3_5Attention(CachedAttention, qwen3_5_attention.Qwen3_5Attention):
    """Attention that remembers, with a gate for what its heads return."""

    dropout_of_heads = "_dropout_layer"

    def compute_query_shape(self, input_shape):
        return *input_shape[:2], self.num_query_heads, self.head_dim

    def project(self, x, positions):
        query, gate = ops.split(self.heads("query", x), 2, axis=-1)
        query = self.rotate(self._query_norm(query), positions)
        key = self.rotate(self._key_norm(self.heads("key", x)), positions)
        return query, key, self.heads("value", x), gate

    def merge_heads(self, x, gate):
        return super().merge_heads(x * ops.sigmoid(gate))


@replaces(qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet)
class Qwen3_5GatedDeltaNet(
    Recurrent, qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet
):
    """Linear attention, whose state is what it would otherwise attend to."""

    projections = {"query_key_value": "in_proj_qkv", "output": "out_proj"}

    @property
    def state_shapes(self):
        return StateShapes(
            key=(2 * self.key_dim + self.value_dim, self.conv_kernel_size - 1),
            value=(self.num_v_heads, self.head_k_dim, self.head_v_dim),
        )

    def compute_query_shape(self, input_shape):
        return *input_shape[:2], self.num_v_heads, self.head_v_dim

    def advance(self, x, state, real, kwargs):
        last, memory = state
        return qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet.call(
            self if real is None else _Padded(self, real),
            x,
            attention_mask=real,
            cache=(ops.cast(last, x.dtype), memory),
        )


class _Padded:
    """A layer whose gates are closed to padding.

    Upstream's code has memory fade over padding, and writes it.
    """

    def __init__(self, layer, real):
        self._layer, self._real = layer, real[:, :, None]

    def __getattr__(self, name):
        return getattr(self._layer, name)

    def in_proj_a(self, x):
        return ops.where(self._real, self._layer.in_proj_a(x), _SHUT)

    def in_proj_b(self, x):
        return ops.where(self._real, self._layer.in_proj_b(x), _SHUT)


@replaces(keras_hub.models.Qwen3_5Backbone)
class Qwen3_5Backbone(keras_hub.models.Qwen3_5Backbone, CachedBackbone):
    """Qwen 3.5, for text, with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3_5Backbone`, without a
    `vision_encoder`: the same arguments, weights and files. `CachedBackbone`
    describes what it can be called with beyond upstream's inputs.

    Differs from upstream, on purpose: no attention has a window, as in the
    models that were trained. Upstream's has `sliding_window_size` on
    TensorFlow, and none elsewhere.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Qwen3_5Backbone(
        vocabulary_size=100, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2412.06464
    """

    def mend(self):
        attend_to_all(self.blocks)


def attend_to_all(blocks):
    """Gives attention no window."""
    for block in blocks:
        if block.layer_type == "full_attention":
            block._self_attention_layer.sliding_window_size = None


@replaces(keras_hub.models.Qwen3_5CausalLM)
class Qwen3_5CausalLM(CausalLM, keras_hub.models.Qwen3_5CausalLM):
    """Qwen 3.5 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Qwen3_5CausalLM`. See
    `CausalLM`.

    Differs from upstream, on purpose: padding does not change what is
    remembered, and no token is read twice, so that steps are what the whole
    graph says.
    """

    backbone_cls = Qwen3_5Backbone
