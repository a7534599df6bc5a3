"""Gemma 4: layers share keys and values, and have inputs of their own."""

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.gemma4 import gemma4_attention
from keras_hub.src.models.gemma4 import gemma4_decoder_block
from keras_hub.src.models.gemma4 import gemma4_moe

from keras_nlp_cache.attention.sharing import SharingAttention
from keras_nlp_cache.blocks.by_layers import CallsItsLayers
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import WeighedExperts
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.roles import Roles


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


@replaces(keras_hub.models.Gemma4Backbone)
class Gemma4Backbone(keras_hub.models.Gemma4Backbone, CachedBackbone):
    """Gemma 4 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma4Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    The last `num_kv_shared_layers` layers read the keys and values of earlier
    ones, and have no entries in the cache. Global layers have as many heads, of
    as many numbers, as they are said to, and so have their entries. With
    `enable_moe_block`, a decode step reads the experts that tokens choose.

    `position_ids` `(B, T)` may be left out. With a cache, they are what
    `token_positions` are.

    Differs from upstream, on purpose: quantized, and with layers of the
    feed-forward network that an edit replaced, blocks compute what these layers
    do. Upstream's read the numbers that are stored in them.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma4Backbone(
        vocabulary_size=100, image_size=16, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64, head_dim=8,
        sliding_window_pattern=2, num_kv_shared_layers=2,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    assert len(cache) == 2
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```
    """

    roles = Roles(beside_text=("position_ids",))

    def mend(self):
        if any(x.use_bidirectional_attention for x in self.blocks):
            raise ValueError(
                "Expected `use_bidirectional_attention` to be `False`. "
                "Received: True. Attention to what follows has no cache."
            )

    def _normalize(self, inputs):
        inputs = super()._normalize(inputs)
        positions = inputs["position_ids"]
        is_ours = inputs["attention_mask"] is not None or (
            inputs["cache"][0][0] is not None
        )
        if positions is None or not is_ours:
            return inputs
        if inputs["token_positions"] is not None:
            raise ValueError(
                "Expected `position_ids` or `token_positions`, which are the "
                "same with a cache or an `attention_mask`. Received both, of "
                f"shapes {tuple(positions.shape)} and "
                f"{tuple(inputs['token_positions'].shape)}."
            )
        return {**inputs, "token_positions": positions, "position_ids": None}


@replaces(keras_hub.models.Gemma4CausalLM)
class Gemma4CausalLM(CausalLM, keras_hub.models.Gemma4CausalLM):
    """Gemma 4 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma4CausalLM`. See `CausalLM`.
    """

    backbone_cls = Gemma4Backbone

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<turn|>")

    def _logits(self, hidden_states):
        logits = super()._logits(hidden_states)
        cap = self.final_logit_cap
        return logits if cap is None else ops.tanh(logits / cap) * cap

    def __call__(self, inputs, *args, **kwargs):
        # Upstream's has to be told where tokens stand.
        if isinstance(inputs, dict):
            inputs = {"position_ids": None, **inputs}
        return super().__call__(inputs, *args, **kwargs)
