"""Which einsums are those of a dense layer: a product with one matrix."""

import math


def as_matrix(equation, kernel_shape):
    """How an input and a kernel are to be reshaped for a matrix product.

    Args:
        equation: str, such as `"bqm,muh->bquh"`, of an input and a kernel.
        kernel_shape: Tuple of ints.

    Returns:
        A tuple `(count, free)`: the last `count` axes of the input are summed
        over, and `free` is the tuple of sizes that take their place. So the
        kernel is a matrix of shape `(-1, math.prod(free))`. `None` if the last
        axes of the input do not meet the first of the kernel (but for axes of
        size 1).
    """
    if "->" not in equation or "." in equation:
        return None
    terms, output = equation.replace(" ", "").split("->")
    x_axes, _, kernel_axes = terms.partition(",")
    count = len(set(x_axes) & set(kernel_axes))
    kept, summed = x_axes[: len(x_axes) - count], x_axes[-count:]
    at = kernel_axes.find(summed) if count else -1
    if at < 0 or math.prod(kernel_shape[:at]) != 1:
        return None
    if output != kept + kernel_axes.replace(summed, ""):
        return None
    return count, (*kernel_shape[:at], *kernel_shape[at + count :])
