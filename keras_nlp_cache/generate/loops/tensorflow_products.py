"""Dense layers on TensorFlow, so that XLA multiplies in the fastest way.

Where one row is multiplied with a matrix that was reshaped or transposed just
before, XLA on a CPU makes one loop of both, which adds up number by number.
Measured on 2 cores, in a decode step of SmolLM2: 38 ms, and 26 ms where every
matrix is one as it comes in.
"""

import contextlib
import math

import keras
import tensorflow as tf

from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.products.dense import as_matrix


def kernels_as_matrices(model):
    """The kernels of einsum layers, as the matrices that they are.

    To be called outside of the loop in which they are used: inside, it would
    be the reshape that makes them slow.

    Args:
        model: A `keras.Model`.

    Returns:
        A list of pairs, a `keras.Variable` and a tensor `(K, N)`.
    """
    matrices = {}
    for layer in model._flatten_layers():
        # Some layers of upstream's are never called.
        if not layer.built or not is_exactly(layer, keras.layers.EinsumDense):
            continue
        kernel = layer.kernel
        # With LoRA it is a tensor.
        if layer.quantization_mode or not isinstance(kernel, keras.Variable):
            continue
        reshapes = as_matrix(layer.equation, kernel.shape)
        if reshapes is not None and len(kernel.shape) > 2:
            shape = (-1, math.prod(reshapes[1]))
            matrices[id(kernel)] = kernel, tf.reshape(kernel.value, shape)
    return list(matrices.values())


@contextlib.contextmanager
def using_matrices(matrices, variables):
    """In this scope, kernels are read from what `kernels_as_matrices()` made.

    Layers reshape them to matrices again, and XLA leaves both reshapes out.

    Args:
        matrices: From `kernels_as_matrices()`.
        variables: All variables of the model. What is assigned in the scope
            to others than kernels, such as a seed, is kept.
    """
    mapping = [
        (variable, tf.reshape(matrix, variable.shape))
        for variable, matrix in matrices
    ]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        yield
    kernels = {id(variable) for variable, _ in matrices}
    for variable in variables:
        value = scope.get_current_value(variable)
        if value is not None and id(variable) not in kernels:
            variable.assign(value)


def logits(embedding, hidden_states):
    """What `embedding(hidden_states, reverse=True)` returns.

    Args:
        embedding: A `keras.layers.ReversibleEmbedding`.
        hidden_states: Tensor `(B, T, hidden_dim)`.

    Returns:
        Logits `(B, T, vocabulary_size)`.
    """
    batch, length, hidden_dim = hidden_states.shape
    if (batch, length) != (1, 1):
        return embedding(hidden_states, reverse=True)
    if _is_plain_product(embedding):
        # Keras transposes the embeddings first.
        row = tf.reshape(hidden_states, (1, hidden_dim))
        matrix = keras.ops.cast(embedding.embeddings, row.dtype)
        return tf.matmul(row, matrix, transpose_b=True)[None]
    # Of two rows, XLA makes a product by itself.
    rows = tf.concat([hidden_states, hidden_states], axis=1)
    return embedding(rows, reverse=True)[:, :1]


def _is_plain_product(embedding):
    return (
        type(embedding).call is keras.layers.ReversibleEmbedding.call
        and embedding.tie_weights
        and embedding.reverse_dtype is None
        and embedding.logit_soft_cap is None
        and embedding.quantization_mode is None
        and not embedding.lora_enabled
    )
