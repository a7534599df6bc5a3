"""A product with a weight, inside of the step that looks weights up."""

import contextlib
import contextvars
import dataclasses
import math

import keras
from keras import ops

from keras_nlp_cache.products import choice

_weights = contextvars.ContextVar("keras_nlp_cache_weights", default=None)
# What was computed of several weights, until each had its part of it.
_computed = contextvars.ContextVar("keras_nlp_cache_computed", default=None)


@contextlib.contextmanager
def multiplying_with(weights, arrays):
    """In this scope, layers multiply with packed weights where it is worth it.

    To be entered in what is compiled, or captured: there are no gradients.

    Args:
        weights: `Weights`, or `None` for the backend's own products.
        arrays: As from `packed_now()`, in what is compiled.
    """
    with _looking_up(weights and weights.by_variable(arrays)):
        yield


@contextlib.contextmanager
def _looking_up(weights):
    tokens = _weights.set(weights), _computed.set({})
    try:
        yield
    finally:
        _weights.reset(tokens[0])
        _computed.reset(tokens[1])


def known_of(variables):
    """What this scope knows of variables, a tuple of tensors for each.

    Args:
        variables: List of `keras.Variable`s.
    """
    weights = _weights.get() or {}
    found = [weights.get(id(x)) for x in variables]
    return [() if x is None else x.arrays or () for x in found]


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
            weights[id(variable)] = dataclasses.replace(
                weights[id(variable)], arrays=tuple(arrays)
            )
    with _looking_up(weights):
        yield


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
    if not is_looked_up(variable) or _has_a_say_in_precision():
        return None
    known = _weights.get()[id(variable)]
    form = known.form
    kept = tuple(x.shape[: len(x.shape) - axes])
    if None in kept or math.prod(x.shape[len(kept) :]) != form.depth:
        return None
    rows = math.prod(kept)
    # Nothing is packed for more rows than were expected.
    if rows > choice.most_rows(form.kind) or known.arrays == ():
        return None
    if known.arrays is None:
        arrays = (ops.convert_to_tensor(variable.value),)
    elif len(known.packed.weights) > 1:
        y = _part(known, x, (rows, form.depth), epsilon)
        return ops.reshape(y, (*kept, known.outputs))
    else:
        arrays = known.arrays
    if form.dtype == "int8":
        arrays = (*arrays, ops.cast(ops.reshape(scale, (-1,)), x.dtype))
    y = _multiply(form, ops.reshape(x, (rows, form.depth)), arrays, epsilon)
    return ops.reshape(y, (*kept, form.outputs))


def _part(known, x, shape, epsilon):
    """A product of several at once, made when the first is asked for.

    Args:
        known: `Known`, of one of the variables.
        x: Tensor, of which it is whether it is the same.
        shape: Of `x` as a matrix.
        epsilon: As for `product()`, the same for all.

    Returns:
        Tensor `(rows, known.outputs)`.
    """
    computed, weights = _computed.get(), known.packed.weights
    of, y, left = computed.get(id(known.packed), (None, None, ()))
    if of is not x or known.start not in left:
        arrays = known.arrays
        if known.form.dtype == "int8":
            scales = [ops.reshape(z.scale, (-1,)) for z in weights]
            arrays = (*arrays, ops.cast(ops.concatenate(scales), x.dtype))
        y = _multiply(known.form, ops.reshape(x, shape), arrays, epsilon)
        sizes = [z.form.outputs for z in weights]
        left = {sum(sizes[:i]) for i in range(len(sizes))}
    left = left - {known.start}
    # Not longer than it is of use: what is traced may end before.
    computed.pop(id(known.packed), None)
    if left:
        computed[id(known.packed)] = x, y, left
    return y[:, known.start : known.start + known.outputs]


def _has_a_say_in_precision():
    """Whether PyTorch was told how exact its products are to be."""
    if keras.config.backend() != "torch":
        return False
    import torch

    exact = torch.get_float32_matmul_precision() == "highest"
    return torch.is_autocast_enabled("cpu") or not exact


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
