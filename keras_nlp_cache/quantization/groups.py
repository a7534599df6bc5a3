"""Weights with a scale for each group of 32 numbers, as GGUF files store them.

Three of the formats in such files are kept number by number: `Q8_0`, int8 with
a scale for each group, `Q4_0`, int4 with one, and `Q4_1`, int4 with a scale and
the smallest number of the group. A group lies along the axis that a product
sums over.

The layers are those of Keras, quantized to `"int8"` or `"int4"`, but for their
scales, which Keras has for whole channels in int8, and their zeros, which it
rounds to integers in int4. The two policies say so of a layer and are saved
with it, so that what loads it knows, and what does not know them refuses the
file. Nothing rounds activations.
"""

import keras
from keras import ops

from keras_nlp_cache.files.gguf_preset.stored import GROUP

_PACKAGE = "keras_nlp_cache"


class _InGroups:
    """What is the same in both policies."""

    def _check_quantization_mode(self, mode, compute_dtype):
        # What Keras refuses are activations rounded to int8 in float16. Here
        # nothing rounds them.
        pass


@keras.saving.register_keras_serializable(_PACKAGE)
class Int8GroupsDTypePolicy(
    _InGroups, keras.dtype_policies.QuantizedDTypePolicy
):
    """Weights of int8, with a scale for each group of 32: `Q8_0`.

    Args:
        mode: `"int8"`.
        source_name: Name of the policy for all else, such as `"float32"`.
    """

    def __init__(self, mode="int8", source_name=None):
        super().__init__(mode, source_name)


@keras.saving.register_keras_serializable(_PACKAGE)
class Int4GroupsDTypePolicy(_InGroups, keras.dtype_policies.Int4DTypePolicy):
    """Weights of int4, with a scale and a zero for each group of 32.

    Args:
        mode: `"int4/32"`.
        source_name: Name of the policy for all else, such as `"float32"`.
        zero_dtype: `"int8"`, enough for `Q4_0`, or `"float32"`, for `Q4_1`: the
            zero of such a group is a fraction.
    """

    def __init__(
        self, mode=f"int4/{GROUP}", source_name=None, zero_dtype="int8"
    ):
        source_name = source_name or keras.config.dtype_policy().name
        super().__init__(mode, source_name)
        self.zero_dtype = zero_dtype

    def __eq__(self, other):
        return super().__eq__(other) and self.zero_dtype == other.zero_dtype

    def get_config(self):
        return {**super().get_config(), "zero_dtype": self.zero_dtype}


def policy_for(kind, source_name):
    """The policy of a layer whose weights are kept.

    Args:
        kind: str, what GGUF calls the format: `"Q8_0"`, `"Q4_0"` or `"Q4_1"`.
        source_name: Name of the policy for all else.
    """
    if kind == "Q8_0":
        return Int8GroupsDTypePolicy(source_name=source_name)
    return Int4GroupsDTypePolicy(
        source_name=source_name,
        zero_dtype="float32" if kind == "Q4_1" else "int8",
    )


def policy_of(layer):
    """The dtype policy of a layer, where a map has one for each path, too."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path] if layer.path else policy.default_policy
    return policy


def in_groups(layer):
    """Whether a layer is quantized in groups as here.

    Args:
        layer: Any layer.
    """
    return isinstance(policy_of(layer), _InGroups)


def widened(numbers, scale, zero=None, axis=0):
    """What the numbers of groups stand for.

    Args:
        numbers: Integer tensor.
        scale: Tensor with one scale in place of 32 numbers along `axis`.
        zero: Optional tensor like `scale`, what to subtract first.
        axis: int. Along which groups lie.

    Returns:
        A float32 tensor like `numbers`.
    """

    def for_each(x):
        return ops.repeat(ops.cast(x, "float32"), GROUP, axis=axis)

    numbers = ops.cast(numbers, "float32")
    if zero is not None:
        numbers = ops.subtract(numbers, for_each(zero))
    return ops.multiply(numbers, for_each(scale))


def refuse_lora(layer):
    """Raises an error for what Keras would round when it saves a layer."""
    raise ValueError(
        "Expected a layer whose weights are not kept as a GGUF file stores "
        f"them, for `enable_lora()`. Received: {layer.path!r}. Keras merges "
        "such adapters when it saves the layer, and would round the sum "
        "otherwise. Use `keras_nlp_cache.surgery.add_lora()`, or load the file "
        "without `keep_quantized`."
    )
