"""Gives layers weights in groups of 32, as `quantization/groups.py` has them.

A layer is quantized by Keras' own code, and then has its scales and zeros
exchanged for those of groups. What loads a saved model does the same.
"""

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.files.gguf_preset.stored import GROUP
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers.specializing import specialize
from keras_nlp_cache.products.layers import matrix_of
from keras_nlp_cache.products.layers import specialize_dense
from keras_nlp_cache.quantization.groups import in_groups
from keras_nlp_cache.quantization.groups import policy_for
from keras_nlp_cache.quantization.groups import policy_of
from keras_nlp_cache.quantization.logits import ReversibleEmbedding

# The axis along which groups lie, in what is a matrix.
_AXES = {"kernel": 0, "embeddings": 1, "reverse_embeddings": 0}


def matrices_of(layer):
    """The matrices of a layer that can be kept in groups.

    Args:
        layer: Any layer.

    Returns:
        A dictionary from names to pairs of a variable and how many numbers a
        product with it sums over. Empty if the layer has none.
    """
    if not layer.built or getattr(layer, "quantization_mode", None) is not None:
        return {}
    if getattr(layer, "lora_enabled", False):
        return {}
    if _is_dense(layer):
        sizes = matrix_of(layer)
        return {} if sizes is None else {"kernel": (layer._kernel, sizes[0])}
    if _is_embedding(layer):
        found = {"embeddings": (layer._embeddings, layer.output_dim)}
        if not layer.tie_weights:
            found["reverse_embeddings"] = (
                layer.reverse_embeddings,
                layer.output_dim,
            )
        return found
    return {}


def quantize_empty(layer, kind):
    """Quantizes a layer in groups, without a look at the weights it has.

    Args:
        layer: A layer that has `matrices_of()`, which it loses. Changed in
            place.
        kind: str, what GGUF calls the format, such as `"Q4_0"`.
    """
    if _is_embedding(layer):
        shape = layer.input_dim, layer.output_dim
    else:
        shape = tuple(layer._kernel.shape)
    for variable, _ in matrices_of(layer).values():
        layer._untrack_variable(variable)
    # Set in the usual way, Keras would quantize what is there.
    layer._dtype_policy = policy_for(kind, layer.dtype_policy.name)
    layer._tracker.unlock()
    with weight_paths.scope(layer.path):
        layer.quantized_build(shape, layer.quantization_mode)
    layer._tracker.lock()
    have_groups([layer])


def have_groups(layers):
    """Gives layers that Keras built quantized the scales of their groups.

    To be called before weights are loaded, for it makes new ones.

    Args:
        layers: Iterable of layers. Those that are `in_groups()`, and what is
            inside of others, are changed in place, once.
    """
    for outer in layers:
        for layer in outer._flatten_layers():
            if in_groups(layer) and not hasattr(layer, "_has_groups"):
                _have_groups(layer)
        for layer in outer._flatten_layers():
            # Where PyTorch keeps what those around them had. Asked again, it
            # looks for what there is.
            if "_torch_params" in getattr(layer, "_modules", ()):
                del layer._torch_params


def _have_groups(layer):
    if _is_embedding(layer):
        specialize(layer, ReversibleEmbedding)
        tokens, groups = layer.input_dim, layer.output_dim // GROUP
        shapes = {"embeddings": (tokens, groups)}
        if not layer.tie_weights:
            shapes["reverse_embeddings"] = groups, tokens
    else:
        specialize_dense(layer)
        depth, outputs = matrix_of(layer)
        shapes = {"kernel": (depth // GROUP, outputs)}
    layer._has_groups = True
    # Which Keras would have for embeddings.
    layer.inputs_quantizer = None
    layer._tracker.unlock()
    with weight_paths.scope(layer.path):
        for name, shape in shapes.items():
            _exchange(layer, f"{name}_scale", shape, "float32")
            if layer.quantization_mode == "int4":
                zero_dtype = policy_of(layer).zero_dtype
                _exchange(layer, f"{name}_zero", shape, zero_dtype)
        if layer.quantization_mode == "int4":
            # Keras assigns some, which comes to nothing where variables have
            # no value yet.
            shape = tuple(layer.g_idx.shape)
            _exchange(layer, "g_idx", shape, "float32", _numbers_of_groups)
    layer._tracker.lock()


def _exchange(layer, name, shape, dtype, initializer="zeros"):
    layer._untrack_variable(getattr(layer, name))
    variable = layer.add_weight(
        name=name,
        shape=shape,
        initializer=initializer,
        dtype=dtype,
        # What is widened with it is rounded when it is multiplied.
        autocast=False,
        trainable=False,
    )
    setattr(layer, name, variable)


def _numbers_of_groups(shape, dtype):
    return ops.floor_divide(ops.arange(shape[0], dtype=dtype), GROUP)


def assign(layer, name, groups, arrange):
    """Assigns a matrix of a layer that is `in_groups()`.

    Args:
        layer: A layer.
        name: str, a key of `matrices_of()`.
        groups: `Groups` of the matrix, as they are stored.
        arrange: Function from an array of its numbers, as they are stored, to
            one as the layer has them. `None` if these are the same.

    Raises:
        ValueError: If groups are not groups any more, once arranged.
    """
    axis = _AXES[name]
    numbers, scale, zero = _numbers_and_zeros(groups)
    matrix = numbers if arrange is None else arrange(numbers)
    if name == "kernel":
        matrix = matrix.reshape(matrix_of(layer))
    shape = matrix.shape

    def by_group(x):
        if arrange is None:
            return x
        wide = arrange(np.repeat(x, GROUP, axis=1)).reshape(shape)
        wide = np.moveaxis(wide, axis, 0).reshape(-1, GROUP, shape[1 - axis])
        first = np.moveaxis(wide[:, 0], 0, axis)
        if not (wide == wide[:, :1]).all():
            raise ValueError(
                f"Expected groups of {GROUP} numbers that {layer.path!r} sums "
                "over. Received: a matrix that is stored in another order. "
                "Load the file without `keep_quantized`."
            )
        return first

    variable = getattr(layer, f"_{name}", None)
    if variable is None:
        variable = getattr(layer, name)
    if layer.quantization_mode == "int4":
        packed_axis = 0 if name == "reverse_embeddings" else -1
        packed, _, _ = keras.quantizers.pack_int4(matrix, axis=packed_axis)
        variable.assign(packed)
        getattr(layer, f"{name}_zero").assign(by_group(zero))
    else:
        variable.assign(matrix.reshape(variable.shape))
    scale = by_group(scale).astype("float32")
    getattr(layer, f"{name}_scale").assign(scale)


def _numbers_and_zeros(groups):
    """Numbers, scales, and what to subtract from numbers first."""
    numbers, scale, smallest = groups
    if smallest is None:
        return numbers, scale, np.zeros_like(scale, np.int8)
    # Where all numbers of a group are the same, there is no scale to divide
    # by: `smallest * (0 - -1)`.
    flat = scale == 0
    zero = -8 - smallest / np.where(flat, 1, scale).astype("float64")
    numbers = np.where(np.repeat(flat, GROUP, axis=1), 0, numbers - 8)
    return (
        numbers.astype(np.int8),
        np.where(flat, smallest, scale),
        np.where(flat, -1, zero).astype("float32"),
    )


def _is_dense(layer):
    return is_exactly(layer, keras.layers.Dense) or is_exactly(
        layer, keras.layers.EinsumDense
    )


def _is_embedding(layer):
    cls = keras.layers.ReversibleEmbedding
    return type(layer) is cls or type(layer) is ReversibleEmbedding
