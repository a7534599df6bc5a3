"""Which quantizers of activations kernels of our own do the work of."""

import keras


def is_rounding(quantizer):
    """Whether a quantizer rounds rows to int8 by their largest number.

    Args:
        quantizer: `keras.quantizers.Quantizer`, or `None`.
    """
    return (
        type(quantizer) is keras.quantizers.AbsMaxQuantizer
        and tuple(quantizer.value_range) == (-127, 127)
        and quantizer.output_dtype == "int8"
    )
