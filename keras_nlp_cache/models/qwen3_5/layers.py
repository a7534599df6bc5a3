"""The layers of Qwen 3.5: attention with a gate, a delta rule with a state."""

import numpy as np
from keras import ops
from keras_hub.src.models.qwen3_5 import qwen3_5_attention
from keras_hub.src.models.qwen3_5 import qwen3_5_decoder
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.recurrent import Recurrent
from keras_nlp_cache.attention.rotation import turned
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.drop_in import replaces

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

    def rotate(self, x, positions):
        if len(positions.shape) == 2:
            return super().rotate(x, positions)
        # In a grid: pairs of a head turn by time, height and width, by turns.
        size = self.rotary_dim
        pair = np.arange(size // 2)
        axis = pair % 3
        axis[pair >= 3 * np.array([0, *self.mrope_section[1:]])[axis]] = 0
        angle = ops.take(positions, axis.astype("int32"), axis=-1)
        angle = ops.cast(angle, "float32") * ops.cast(
            self.rotary_embedding_layer._get_inverse_freq(size), "float32"
        )
        return ops.concatenate(
            (turned(x[..., :size], angle), x[..., size:]), axis=-1
        )

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
