"""The layers of Gemma 3n that remember, and what blocks are made of."""

import functools

import keras
from keras import ops
from keras_hub.src.models.gemma3n import gemma3n_attention
from keras_hub.src.models.gemma3n import gemma3n_text_decoder
from keras_hub.src.models.gemma3n import gemma3n_text_layers

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.sharing import SharingAttention
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.specializing import Specialized


@replaces(gemma3n_attention.Gemma3nTextAttention)
class Gemma3nTextAttention(
    SharingAttention, gemma3n_attention.Gemma3nTextAttention
):
    """Grouped-query attention that remembers, or reads an earlier layer's."""

    scale = 1.0
    sees_spans = False
    merges_heads = True
    dropout_of_weights = "dropout"
    shared_argument = "cache"
    heads_first = True

    @property
    def borrows(self):
        return self.is_kv_shared_layer

    @property
    def projections(self):
        names = {"query": "q_proj", "output": "o_proj"}
        if not self.borrows:
            names |= {"key": "k_proj", "value": "v_proj"}
        return names

    @property
    def key_value_shape(self):
        return self.num_key_value_heads, self.head_dim

    def compute_query_shape(self, input_shape):
        return (*input_shape[:2], self.num_attention_heads, self.head_dim)

    def rotary(self):
        return self.rotary_embedding

    def heads(self, name, x):
        x = super().heads(name, x)
        return ops.reshape(x, (*ops.shape(x)[:2], -1, self.head_dim))

    def project(self, x, positions):
        query = self.rotate(self.q_norm(self.heads("query", x)), positions)
        if self.borrows:
            return query, None, None
        key = self.rotate(self.k_norm(self.heads("key", x)), positions)
        return query, key, self.v_norm(self.heads("value", x))

    def call(self, hidden_states, attention_mask=None, **kwargs):
        # The mask comes by place.
        return super().call(
            hidden_states, attention_mask=attention_mask, **kwargs
        )

    def _all_at_once(self, x, attention_mask, cache=None, **kwargs):
        # A window is still to be put over the mask.
        cache = None if self.borrows else cache
        return CachedAttention._all_at_once(self, x, attention_mask, cache)

    def returned_with(self, output, shared):
        return output, None, shared

    def returned(self, output):
        return self.returned_with(output, None)


@replaces(gemma3n_text_layers.Gemma3nTextAltUp)
class Gemma3nTextAltUp(Specialized, gemma3n_text_layers.Gemma3nTextAltUp):
    """What a block makes of its streams, and starts from."""

    def predict(self, hidden_states):
        predictions = super().predict(hidden_states)
        if block_call.current() is not None:
            # The residual stream of the block, which edits inside it see.
            block_call.current().hidden_states = predictions[
                self.altup_active_idx
            ]
        return predictions


_gelu = functools.partial(keras.activations.gelu, approximate=True)


class _Packed:
    """Calls upstream's block with its three arguments as one."""

    def call(self, x, per_layer_input=None, padding_mask=None, **kwargs):
        return super().call((x, per_layer_input, padding_mask), **kwargs)


@replaces(gemma3n_text_decoder.Gemma3nTextDecoderBlock)
class Gemma3nTextDecoderBlock(
    DecoderBlock, _Packed, gemma3n_text_decoder.Gemma3nTextDecoderBlock
):
    """A block whose attention remembers, or reads an earlier layer's.

    It takes and returns all streams, `(streams, B, T, hidden_dim)`.
    """

    own_arguments = ("entries", "per_layer_input", "padding_mask")
    padding_argument = "padding_mask"
    carries = ("cache",)
    shared_argument = "cache"

    def on_specialized(self):
        super().on_specialized()
        if self.hidden_activation == "gelu_approximate":
            # One for all blocks, for them to be alike.
            self.act_fn = self.mlp.act_fn = _gelu

    def build(self, input_shape):
        if not isinstance(input_shape[0], (list, tuple)):
            # Of hidden states alone, as for any block.
            size = self.hidden_size_per_layer_input
            input_shape = input_shape, (*input_shape[1:-1], size), None
        # Upstream's takes no lists, which a file has.
        super().build(
            tuple(None if x is None else tuple(x) for x in input_shape)
        )

    def own_parts(self):
        return {
            "attention": "post_attention_layernorm",
            "attention.norm": "input_layernorm",
            "attention.post_norm": "post_attention_layernorm",
            "feedforward": "post_feedforward_layernorm",
            "feedforward.norm": "pre_feedforward_layernorm",
            "feedforward.post_norm": "post_feedforward_layernorm",
        }

    @property
    def streams(self):
        return self.altup_num_inputs

    def arranged(self, args, kwargs):
        args, kwargs = super().arranged(args, kwargs)
        if isinstance(args[0], (tuple, list)):
            (x, per_layer_input, padding_mask), *args = args
            kwargs = {
                **kwargs,
                "per_layer_input": per_layer_input,
                "padding_mask": padding_mask,
            }
            args = (x, *args)
        if not self.is_kv_shared_layer and "entries" in kwargs:
            # Of the block before, if it was called with what that was.
            kwargs = {**kwargs, "cache": None}
        return args, kwargs

    def upstream_spec(self, *args, **kwargs):
        x = super().upstream_spec(*args, **kwargs)
        heads, head_dim = self.num_key_value_heads, self.head_dim
        shape = x.shape[1], 2, heads, None, head_dim
        return x, keras.KerasTensor(shape, self.compute_dtype)
