"""A block that calls the layers it is made of, and reads nothing past them."""

import contextlib

import keras
from keras import ops

from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.experts.mixture import choosing
from keras_nlp_cache.experts.mixture import have_few_choices
from keras_nlp_cache.layers import block_call


class CallsItsLayers:
    """Mixin for a decoder block of upstream's that does not.

    Placed between `DecoderBlock` and upstream's class, that of Gemma 4.
    Upstream's code multiplies with the kernels of its feed-forward network by
    itself, past what else the layers do that hold them: what surgery put there,
    small weights that have to be scaled, products of our own. So it runs where
    there is none of these, without a cache, and else this does.
    """

    def call(self, *args, **kwargs):
        if block_call.current().entries or not self._has_plain_kernels():
            return self.by_layers(*args, **kwargs)
        return super().call(*args, **kwargs)

    def _has_plain_kernels(self):
        layers = self.gating_ffw, self.gating_ffw_2, self.ffw_linear
        return all(
            is_exactly(x, keras.layers.EinsumDense)
            and x.quantization_mode is None
            for x in layers
        )

    def by_layers(
        self,
        x,
        padding_mask=None,
        vision_mask=None,
        per_layer_input=None,
        shared_kv=None,
        positions=None,
    ):
        """What upstream's code computes, without a cache of upstream's.

        Returns:
            As upstream's.
        """
        x = _in_range(x)
        y = self.pre_attention_norm(x)
        mask = self._compute_attention_mask(
            y, padding_mask, vision_mask, None, 0
        )
        y, shared_kv = self.attention(
            y, attention_mask=mask, shared_kv=shared_kv, positions=positions
        )
        y = self.post_attention_norm(y)
        x = _sum(x, self.attention_dropout(y) if self.dropout else y)
        y = self.post_ffw_norm(self._feedforward(x))
        x = _sum(x, self.feedforward_dropout(y) if self.dropout else y)
        if self.hidden_size_per_layer_input and per_layer_input is not None:
            y = _gelu(self.per_layer_input_gate(x))
            y = self.per_layer_up_proj(y * ops.cast(per_layer_input, y.dtype))
            x = x + self.post_per_layer_input_norm(y)
        return x * ops.cast(self.layer_scalar, x.dtype), shared_kv

    def _feedforward(self, x):
        y = self.pre_ffw_norm(x)
        y = self.ffw_linear(_gelu(self.gating_ffw(y)) * self.gating_ffw_2(y))
        if not self.enable_moe_block:
            return y
        return self.post_ffw_norm_dense(y) + self._experts(x)

    def _experts(self, x):
        weights = self.moe_router(x)
        y = ops.reshape(self.pre_ffw_norm_moe(x), (-1, x.shape[-1]))
        top_k = self.num_experts_per_token
        scope = contextlib.nullcontext()
        if have_few_choices(x, top_k, self.num_experts):
            scope = choosing(weights, top_k)
        with scope:
            y = self.moe_expert_bank(y, weights)
        return self.post_ffw_norm_moe_path(ops.reshape(y, ops.shape(x)))


def _gelu(x):
    return keras.activations.gelu(x, approximate=True)


# The largest number there is in float16.
_LARGEST = 65504


def _in_range(x):
    if keras.backend.standardize_dtype(x.dtype) != "float16":
        return x
    return ops.clip(x, -_LARGEST, _LARGEST)


def _sum(x, y):
    if keras.backend.standardize_dtype(x.dtype) != "float16":
        return x + y
    total = ops.cast(x, "float32") + ops.cast(y, "float32")
    return ops.cast(ops.clip(total, -_LARGEST, _LARGEST), "float16")
