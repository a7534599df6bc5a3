"""Token embeddings that turn hidden states into logits, quantized."""

import keras
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers.specializing import specialize


def derive_logits(embedding):
    """Gives logits a gradient where quantization took it.

    To be called when an embedding is quantized, and not before, for Keras
    quantizes its own class and no other.

    Args:
        embedding: A `keras.layers.ReversibleEmbedding`, changed in place.
    """
    if embedding.quantization_mode == "int8":
        specialize(embedding, ReversibleEmbedding)


@replaces(keras.layers.ReversibleEmbedding)
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Embeddings whose logits have a gradient when quantized to `"int8"`.

    Upstream rounds hidden states to integers here, through which nothing is
    derived, and adapters are then trained by what is left, the gradient of the
    scale. This derives through the weights, as its dense layers do.
    """

    def _int8_call(self, inputs, reverse=False):
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

    def _int8_embeddings(self):
        """The quantized matrix of logits, `(vocabulary_size, hidden_dim)`."""
        if self.tie_weights:
            values, scale = self._embeddings, self.embeddings_scale
        else:
            values = ops.transpose(self.reverse_embeddings)
            scale = self.reverse_embeddings_scale
        values = ops.cast(values, self.compute_dtype)
        return values / ops.cast(scale, self.compute_dtype)[:, None]
