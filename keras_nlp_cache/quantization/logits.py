"""Token embeddings that turn hidden states into logits, quantized."""

import keras
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers.specializing import specialize
from keras_nlp_cache.quantization.groups import in_groups
from keras_nlp_cache.quantization.groups import refuse_lora
from keras_nlp_cache.quantization.groups import widened


def mend_quantized(embedding):
    """Gives a quantized embedding the class below.

    To be called when an embedding is quantized, and not before, for Keras
    quantizes its own class and no other.

    Args:
        embedding: A `keras.layers.ReversibleEmbedding`, changed in place.
            Others turn nothing into logits.
    """
    if not isinstance(embedding, keras.layers.ReversibleEmbedding):
        return
    if embedding.quantization_mode in ("int8", "int4"):
        specialize(embedding, ReversibleEmbedding)


@replaces(keras.layers.ReversibleEmbedding)
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Embeddings that are quantized, and pay what they use.

    Of `"int8"`, logits have a gradient. Upstream rounds hidden states to
    integers here, through which nothing is derived, and adapters are then
    trained by what is left, the gradient of the scale. This derives through the
    weights, as its dense layers do.

    Of `"int4"`, the embeddings of tokens are unpacked, and no others. Upstream
    unpacks the whole matrix for each token: of SmolLM2, 25 milliseconds.

    Weights may be in groups, see `quantization/groups.py`.
    """

    def _int8_call(self, inputs, reverse=False):
        if in_groups(self):
            return self._call_in_groups(inputs, reverse)
        call = super()._int8_call
        if not reverse or self.inputs_quantizer is None:
            return call(inputs, reverse=reverse)

        @ops.custom_gradient
        def logits(inputs):
            outputs = call(inputs, reverse=True)

            def gradient(*args, upstream=None):
                # JAX passes it by place, the others by name.
                if upstream is None:
                    (upstream,) = args
                if self.logit_soft_cap is not None:
                    slope = 1 - ops.square(outputs / self.logit_soft_cap)
                    upstream = upstream * slope
                return ops.matmul(upstream, self._int8_embeddings())

            return outputs, gradient

        return logits(inputs)

    def _int4_call(self, inputs, reverse=False):
        if in_groups(self):
            return self._call_in_groups(inputs, reverse)
        if reverse:
            return super()._int4_call(inputs, reverse=True)
        tokens = ops.cast(inputs, "int32")
        rows = self._int4_rows(tokens)
        if not self.lora_enabled:
            return rows
        low_rank = ops.take(self.lora_embeddings_a, tokens, axis=0)
        further = ops.matmul(low_rank, self.lora_embeddings_b)
        rows = ops.add(rows, (self.lora_alpha / self.lora_rank) * further)
        return ops.cast(rows, self.compute_dtype)

    def _int4_rows(self, tokens):
        """What upstream computes of tokens, of their rows alone."""
        numbers = keras.quantizers.unpack_int4(
            ops.take(self._embeddings, tokens, axis=0), self.output_dim, axis=-1
        )
        numbers = ops.cast(numbers, self.compute_dtype)
        scale = ops.take(self.embeddings_scale, tokens, axis=0)
        if self._int4_block_size in (None, -1):
            return ops.divide(numbers, ops.expand_dims(scale, axis=-1))
        zero = ops.take(self.embeddings_zero, tokens, axis=0)
        groups = ops.cast(self.g_idx, "int32")
        scale, zero = (ops.take(x, groups, axis=-1) for x in (scale, zero))
        zero = ops.cast(zero, scale.dtype)
        return ops.multiply(ops.subtract(numbers, zero), scale)

    def _call_in_groups(self, inputs, reverse):
        if not reverse:
            return self._rows_in_groups(ops.cast(inputs, "int32"))
        dtype = self.reverse_dtype or self.compute_dtype
        if self.tie_weights:
            matrix = ops.transpose(self._in_groups("_embeddings", -1))
        else:
            matrix = self._in_groups("reverse_embeddings", 0)
        logits = ops.matmul(ops.cast(inputs, dtype), ops.cast(matrix, dtype))
        cap = self.logit_soft_cap
        if cap is None:
            return logits
        return ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)

    def _rows_in_groups(self, tokens):
        """The embeddings of tokens, of which alone groups are widened."""
        rows = self._in_groups(
            "_embeddings", -1, lambda x: ops.take(x, tokens, axis=0)
        )
        return ops.cast(rows, self.compute_dtype)

    def _in_groups(self, name, axis, part=ops.convert_to_tensor):
        """A part of a matrix, in float32, with groups along an axis."""
        numbers = part(getattr(self, name))
        scale = part(getattr(self, f"{name.lstrip('_')}_scale"))
        zero = None
        if self.quantization_mode == "int4":
            numbers = keras.quantizers.unpack_int4(
                numbers, self.output_dim, axis=axis
            )
            zero = part(getattr(self, f"{name.lstrip('_')}_zero"))
        return widened(numbers, scale, zero, axis)

    def enable_lora(self, *args, **kwargs):
        if in_groups(self):
            refuse_lora(self)
        super().enable_lora(*args, **kwargs)

    def _int8_embeddings(self):
        """The quantized matrix of logits, `(vocabulary_size, hidden_dim)`."""
        if self.tie_weights:
            values, scale = self._embeddings, self.embeddings_scale
        else:
            values = ops.transpose(self.reverse_embeddings)
            scale = self.reverse_embeddings_scale
        values = ops.cast(values, self.compute_dtype)
        return values / ops.cast(scale, self.compute_dtype)[:, None]
