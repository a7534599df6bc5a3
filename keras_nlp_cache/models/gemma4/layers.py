"""The layers of Gemma 4 that remember, and what its blocks are made of."""

import keras
from keras import ops
from keras_hub.src.models.gemma4 import gemma4_attention
from keras_hub.src.models.gemma4 import gemma4_decoder_block
from keras_hub.src.models.gemma4 import gemma4_layers
from keras_hub.src.models.gemma4 import gemma4_moe

from keras_nlp_cache.attention.sharing import SharingAttention
from keras_nlp_cache.blocks.by_layers import CallsItsLayers
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import WeighedExperts
from keras_nlp_cache.layers.specializing import Specialized


@replaces(gemma4_attention.Gemma4TextAttention)
class Gemma4TextAttention(
    SharingAttention, gemma4_attention.Gemma4TextAttention
):
    """Grouped-query attention that remembers, or reads an earlier layer's."""

    scale = 1.0
    dropout_of_weights = "dropout_layer"

    @property
    def borrows(self):
        return self.is_kv_shared_layer

    @property
    def sees_spans(self):
        return not self.is_global_attention

    @property
    def projections(self):
        names = {"query": "query_dense", "output": "output_dense"}
        if not self.borrows:
            names["key"] = "key_dense"
            if not self.attention_k_eq_v:
                names["value"] = "value_dense"
        return names

    @property
    def key_value_shape(self):
        return self.effective_num_kv_heads, self.head_dim

    def project(self, x, positions):
        query = self.rotate(self.query_norm(self.heads("query", x)), positions)
        if self.borrows:
            return query, None, None
        key = value = self.heads("key", x)
        if not self.attention_k_eq_v:
            value = self.heads("value", x)
        key = self.rotate(self.key_norm(key), positions)
        return query, key, self.value_norm(value)

    def rotate(self, x, positions):
        return self._apply_rope(x, 0, positions=positions)


class _EachExpert:
    """What an expert returns, before it is weighed and added to the others."""

    def call(self, x, *weights):
        if weights:
            return super().call(x, *weights)
        gate = ops.cast(ops.einsum("th,ehi->eti", x, self.gate_proj), "float32")
        gate = ops.cast(keras.activations.gelu(gate, approximate=True), x.dtype)
        x = gate * ops.einsum("th,ehi->eti", x, self.up_proj)
        x = ops.einsum("eti,eih->eth", x, self.down_proj)
        return x * ops.cast(self.per_expert_scale[:, None, None], x.dtype)


@replaces(gemma4_moe.Gemma4MoEBlock)
class Gemma4MoEBlock(WeighedExperts, _EachExpert, gemma4_moe.Gemma4MoEBlock):
    """Experts that are computed if they were chosen."""


@replaces(gemma4_layers.Gemma4ClippableEinsumDense)
class Gemma4ClippableEinsumDense(
    Specialized, gemma4_layers.Gemma4ClippableEinsumDense
):
    """A product in the tower of images, of numbers in some range.

    Quantized, it is what the layer inside does. Upstream's reads its kernel.
    """

    def call(self, x):
        if self.dense.quantization_mode is None:
            return super().call(x)
        if not self.use_clipped_linears:
            return self.dense(x)
        x = _clipped(x, self.input_min, self.input_max)
        return _clipped(self.dense(x), self.output_min, self.output_max)


def _clipped(x, low, high):
    return ops.clip(x, ops.cast(low, x.dtype), ops.cast(high, x.dtype))


@replaces(gemma4_decoder_block.Gemma4TextDecoderBlock)
class Gemma4TextDecoderBlock(
    DecoderBlock, CallsItsLayers, gemma4_decoder_block.Gemma4TextDecoderBlock
):
    """A block whose attention remembers, or reads an earlier block's.

    What it adds to the hidden states is scaled with them, by a number of its
    own, and followed by what it makes of the input for this layer.
    """

    carries = ("shared_kv",)
    shared_argument = "shared_kv"

    def own_parts(self):
        parts = {
            "attention.post_norm": "post_attention_norm",
            "attention": "post_attention_norm",
            "feedforward.post_norm": "post_ffw_norm",
            "feedforward": "post_ffw_norm",
        }
        if self.dropout:
            parts["attention"] = "attention_dropout"
            parts["feedforward"] = "feedforward_dropout"
        return parts

    def upstream_spec(self, *args, **kwargs):
        x = super().upstream_spec(*args, **kwargs)
        shape = x.shape[0], 2, x.shape[1], *self.attention.key_value_shape
        return x, keras.KerasTensor(shape, self.compute_dtype)
