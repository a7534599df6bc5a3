"""Dense layers that multiply with kernels of our own in a decode step.

Keras' layers as they are, but for one line each: where Keras multiplies, they
ask for a product of our own first. Outside of a decode step there is none.
"""

import functools
import math

import keras
from keras import ops

from keras_nlp_cache import drop_in
from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers.specializing import specialize
from keras_nlp_cache.products.dense import as_matrix
from keras_nlp_cache.products.multiplying import is_looked_up
from keras_nlp_cache.products.multiplying import product
from keras_nlp_cache.products.rounding import is_rounding
from keras_nlp_cache.quantization.groups import in_groups
from keras_nlp_cache.quantization.groups import refuse_lora
from keras_nlp_cache.quantization.groups import widened


def specialize_dense(layer):
    """Gives a dense layer of Keras the class that asks for products.

    Args:
        layer: A layer, changed in place if it is one.
    """
    for cls in (keras.layers.Dense, keras.layers.EinsumDense):
        if type(layer) is cls:
            specialize(layer, drop_in.stand_in(cls))
            _let_quantize(layer)


def _let_quantize(layer):
    """Has a layer be quantized, that Keras now takes for a user's subclass.

    What Keras' constructor made of its method asks what it was before.
    """
    quantize = layer.quantize

    @functools.wraps(quantize)
    def quantize_anyway(mode=None, config=None, type_check=True, **kwargs):
        quantize(mode, config, type_check=False, **kwargs)

    layer.quantize = quantize_anyway


class _AsksForProducts:
    """What is the same in dense layers of both kinds.

    The product with `_kernel` is `_product()`, `None` if Keras' own serves.
    """

    def _product(self, x, scale=None, epsilon=None):
        raise NotImplementedError

    def _multiplied(self, x, kernel):
        """Keras' product, with a kernel of floats."""
        raise NotImplementedError

    def _times_lora(self, inputs):
        raise NotImplementedError

    def call(self, inputs, training=None):
        # With LoRA, the kernel is a sum.
        y = None if self.lora_enabled else self._product(inputs)
        if y is None:
            return super().call(inputs, training=training)
        return self._finished(y)

    def _int8_call(self, inputs, training=None):
        if in_groups(self):
            y = self._product(inputs)
            return self._finished(
                self._widened_product(inputs) if y is None else y
            )
        y = None
        if is_looked_up(self._kernel):
            y = self._int8_product(inputs)
        if y is None:
            return super()._int8_call(inputs, training=training)
        return self._finished(self._with_lora(y, inputs))

    def _int8_product(self, x):
        quantizer = self.inputs_quantizer
        if quantizer is None or is_rounding(quantizer):
            epsilon = getattr(quantizer, "epsilon", None)
            return self._product(x, self.kernel_scale, epsilon)
        x, scale = self._quantized(x)
        y = self._product(ops.cast(x, self.compute_dtype), self.kernel_scale)
        return y if y is None else ops.divide(y, scale)

    def _int4_call(self, inputs, training=None):
        y = None
        if is_looked_up(self._kernel):
            x, scale = self._quantized(inputs)
            y = self._product(ops.cast(x, self.compute_dtype))
        if y is None:
            return super()._int4_call(inputs, training=training)
        if scale is not None:
            y = ops.divide(y, scale)
        return self._finished(self._with_lora(y, inputs))

    def _widened_product(self, x):
        """Keras' product with an int8 weight in groups."""
        matrix = ops.reshape(self._kernel, matrix_of(self))
        matrix = widened(matrix, self.kernel_scale)
        matrix = ops.reshape(matrix, self._kernel.shape)
        return self._multiplied(x, ops.cast(matrix, self.compute_dtype))

    def enable_lora(self, *args, **kwargs):
        if in_groups(self):
            refuse_lora(self)
        super().enable_lora(*args, **kwargs)

    def _with_lora(self, y, inputs):
        if not self.lora_enabled:
            return y
        further = ops.matmul(self._times_lora(inputs), self.lora_kernel_b)
        y = ops.add(y, (self.lora_alpha / self.lora_rank) * further)
        return ops.cast(y, self.compute_dtype)

    def _finished(self, y):
        if self.bias is not None:
            y = ops.add(y, self.bias)
        if self.activation is not None:
            y = self.activation(y)
        return y

    def quantize(self, mode=None, type_check=True, config=None):
        # Of a layer that was made of this class, as surgery does.
        ours = type(self) in drop_in.replacements()
        return super().quantize(
            mode, type_check=type_check and not ours, config=config
        )


@replaces(keras.layers.Dense)
class Dense(_AsksForProducts, keras.layers.Dense):
    """`keras.layers.Dense`, with products of our own in a decode step."""

    def _product(self, x, scale=None, epsilon=None):
        return product(x, self._kernel, 1, scale, epsilon)

    def _multiplied(self, x, kernel):
        return ops.matmul(x, kernel)

    def _quantized(self, x):
        if not self.inputs_quantizer:
            return x, None
        return self.inputs_quantizer(x, axis=-1)

    def _times_lora(self, x):
        return ops.matmul(x, self.lora_kernel_a)


@replaces(keras.layers.EinsumDense)
class EinsumDense(_AsksForProducts, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense`, with products of our own in a decode step."""

    def _product(self, x, scale=None, epsilon=None):
        reshapes = as_matrix(self.equation, _matrix_shape(self))
        if reshapes is None:
            return None
        count, free = reshapes
        y = product(x, self._kernel, count, scale, epsilon)
        if y is None:
            return None
        return ops.reshape(y, (*y.shape[:-1], *free))

    def _multiplied(self, x, kernel):
        return ops.einsum(self.equation, x, kernel)

    def _quantized(self, x):
        if not self.inputs_quantizer:
            return x, None
        x, scale = self.inputs_quantizer(x, axis=self.quantization_axis)
        return x, self._adjust_scale_for_quant(scale, "input")

    def _times_lora(self, x):
        return ops.einsum(self.equation, x, self.lora_kernel_a)


def matrix_of(layer):
    """The sizes of a dense layer's weight as a matrix.

    Args:
        layer: A `Dense` or `EinsumDense` of Keras or of ours.

    Returns:
        `(K, N)`, or `None` if it is not a product with one matrix.
    """
    if is_exactly(layer, keras.layers.Dense):
        depth = layer._kernel.shape[0]
        return depth, layer.units
    shape = _matrix_shape(layer)
    reshapes = as_matrix(layer.equation, shape)
    if reshapes is None:
        return None
    outputs = math.prod(reshapes[1])
    return math.prod(shape) // outputs, outputs


def _matrix_shape(layer):
    """The shape of the kernel of an einsum, packed or not."""
    if layer.quantization_mode == "int4":
        return layer.original_kernel_shape
    return layer._kernel.shape
