"""Logits as products of our own with the embeddings of tokens."""

import keras
from keras import ops

from keras_nlp_cache import drop_in
from keras_nlp_cache.products.multiplying import is_looked_up
from keras_nlp_cache.products.multiplying import product
from keras_nlp_cache.products.rounding import is_rounding
from keras_nlp_cache.quantization.groups import in_groups


def is_known(layer):
    """Whether `logits()` knows what a layer computes."""
    cls = keras.layers.ReversibleEmbedding
    return (
        isinstance(layer, cls)
        and type(layer).call is cls.call
        and (
            (
                type(layer)._int4_call is cls._int4_call
                and type(layer)._int8_call is cls._int8_call
            )
            # Which has another gradient.
            or type(layer) is drop_in.stand_in(cls)
        )
        and layer.quantization_mode in (None, "int8", "int4")
        and not layer.lora_enabled
    )


def matrix_variables(embedding):
    """The variables of the matrix that logits are a product with.

    Args:
        embedding: A `keras.layers.ReversibleEmbedding`.

    Returns:
        `(numbers, scale, zero)`, with `None` for what there is not.
    """
    name = "embeddings" if embedding.tie_weights else "reverse_embeddings"
    numbers = "_embeddings" if embedding.tie_weights else name
    return (
        getattr(embedding, numbers),
        getattr(embedding, f"{name}_scale", None),
        getattr(embedding, f"{name}_zero", None),
    )


def logits(embedding, hidden_states):
    """What `embedding(hidden_states, reverse=True)` returns.

    Args:
        embedding: A `keras.layers.ReversibleEmbedding`.
        hidden_states: Tensor `(B, T, hidden_dim)`.

    Returns:
        Logits `(B, T, vocabulary_size)`, or `None` if another form is faster.
    """
    if not is_known(embedding):
        return None
    variable, scale, _ = matrix_variables(embedding)
    if not is_looked_up(variable):
        return None
    mode, dtype = embedding.quantization_mode, embedding.compute_dtype
    x, inputs_scale, epsilon = ops.cast(hidden_states, dtype), None, None
    quantizer = embedding.inputs_quantizer if mode else None
    if mode is None or in_groups(embedding):
        if embedding.reverse_dtype is not None:
            x = ops.cast(x, embedding.reverse_dtype)
    elif mode == "int8" and is_rounding(quantizer):
        epsilon = quantizer.epsilon
    elif quantizer is not None:
        x, inputs_scale = quantizer(x)
        x = ops.cast(x, dtype)
    y = product(x, variable, 1, scale, epsilon)
    if y is None:
        return None
    if inputs_scale is not None:
        y = ops.divide(y, inputs_scale)
    cap = embedding.logit_soft_cap
    return y if cap is None else ops.multiply(ops.tanh(ops.divide(y, cap)), cap)
