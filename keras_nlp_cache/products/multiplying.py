"""A product with a weight, inside of the step that looks weights up."""

import contextlib
import contextvars
import math

import keras
from keras import ops

from keras_nlp_cache.products import choice

_weights = contextvars.ContextVar("keras_nlp_cache_weights", default=None)


@contextlib.contextmanager
def multiplying_with(weights, arrays):
    """In this scope, layers multiply with packed weights where it is worth it.

    To be entered in what is compiled, or captured: there are no gradients.

    Args:
        weights: `Weights`, or `None` for the backend's own products.
        arrays: As from `packed_now()`, in what is compiled.
    """
    token = _weights.set(weights and weights.by_variable(arrays))
    try:
        yield
    finally:
        _weights.reset(token)


def known_of(variables):
    """What this scope knows of variables, a tuple of tensors for each.

    Args:
        variables: List of `keras.Variable`s.
    """
    weights = _weights.get() or {}
    found = [weights.get(id(x)) for x in variables]
    return [() if x is None else x[1] or () for x in found]


@contextlib.contextmanager
def multiplying_as_known(variables, known):
    """In this scope, layers multiply with other packed weights.

    Args:
        variables: List of `keras.Variable`s.
        known: As from `known_of(variables)`, with other tensors.
    """
    weights = dict(_weights.get() or {})
    for variable, arrays in zip(variables, known, strict=True):
        if arrays:
            form, _ = weights[id(variable)]
            weights[id(variable)] = form, tuple(arrays)
    token = _weights.set(weights)
    try:
        yield
    finally:
        _weights.reset(token)


def uses_kernels():
    """Whether kernels of our own run in this scope."""
    return _weights.get() is not None


def is_looked_up(variable):
    """Whether a product with a variable may be one of our own just now."""
    weights = _weights.get()
    return bool(weights) and id(variable) in weights


def product(x, variable, axes=1, scale=None, epsilon=None):
    """Multiplies with a weight, by a kernel of our own.

    Args:
        x: Tensor of a float dtype `(..., K)`.
        variable: `keras.Variable` that the weight is in.
        axes: int. How many of the last axes of `x` make up `K`.
        scale: Of an int8 weight that is not in groups, a tensor of `N` numbers,
            to divide by.
        epsilon: Of the same, what is added to the largest number of a row of
            `x` in order to round all to int8, as `AbsMaxQuantizer` does. `None`
            for no rounding.

    Returns:
        A tensor `(..., N)` of the dtype of `x`. `None` if the weight is not
        known, or another form is faster.
    """
    if not is_looked_up(variable) or _is_autocasting():
        return None
    form, arrays = _weights.get()[id(variable)]
    kept = tuple(x.shape[: len(x.shape) - axes])
    if None in kept or math.prod(x.shape[len(kept) :]) != form.depth:
        return None
    rows = math.prod(kept)
    # Nothing is packed for more rows than were expected.
    if rows > choice.most_rows(form.dtype) or arrays == ():
        return None
    if arrays is None:
        arrays = (ops.convert_to_tensor(variable.value),)
    if form.dtype == "int8":
        arrays = (*arrays, ops.cast(ops.reshape(scale, (-1,)), x.dtype))
    y = _multiply(form, ops.reshape(x, (rows, form.depth)), arrays, epsilon)
    return ops.reshape(y, (*kept, form.outputs))


def _is_autocasting():
    """Whether PyTorch chooses dtypes of products."""
    if keras.config.backend() != "torch":
        return False
    import torch

    return torch.is_autocast_enabled("cpu")


def _multiply(form, x, arrays, epsilon):
    """`x` `(rows, K)` with a packed weight, `(rows, N)`."""
    # Which takes numba to import.
    from keras_nlp_cache.kernels.floats import number_of
    from keras_nlp_cache.kernels.kernel import bits
    from keras_nlp_cache.kernels.kernel import pieces_of
    from keras_nlp_cache.kernels.kernel import tensor_bytes
    from keras_nlp_cache.products.kernels import INT8_WITH_ROUNDED
    from keras_nlp_cache.products.kernels import KERNELS

    weight, *further = arrays
    rows = x.shape[0]
    dtype = keras.backend.standardize_dtype(x.dtype)
    rounds = epsilon is not None
    kernel = INT8_WITH_ROUNDED if rounds else KERNELS[form.dtype]
    return kernel(
        [weight, x, *further],
        shape=(rows, form.outputs),
        dtype=dtype,
        sizes=(
            form.outputs,
            form.depth,
            rows,
            form.block,
            form.packed_block,
            number_of(dtype),
            bits(epsilon or 0),
        ),
        # More rows take longer.
        pieces=pieces_of(tensor_bytes(weight) * (1 + rows // 4)),
    )
