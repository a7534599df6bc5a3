"""Gradients reach a cache that is passed in, and what filled it."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

from tests.families import deep_families
from tests.families import random_tokens
from tests.families import to_numpy

TOKENS = random_tokens(2, 8)
PREFIX = 5


def gradients(function, arrays, compiled=None):
    """Gradients of a function of a list of tensors, as arrays.

    Args:
        function: Returns a scalar.
        arrays: List of arrays, at which to derive.
        compiled: `None`, `"graph"` or `"xla"`.
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        derive = jax.grad(function)
        return (jax.jit(derive) if compiled else derive)(arrays)
    tensors = [ops.convert_to_tensor(x) for x in arrays]
    if backend == "torch":
        tensors = [x.clone().requires_grad_() for x in tensors]
        function(tensors).backward()
        return [x.grad for x in tensors]
    import tensorflow as tf

    def derive(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(tensors)
        return tape.gradient(loss, tensors)

    if compiled:
        derive = tf.function(derive, jit_compile=compiled == "xla")
    return derive(tensors)


def loss_of(hidden_states):
    weights = np.random.default_rng(1).normal(size=hidden_states.shape)
    return ops.mean(hidden_states * ops.cast(weights, hidden_states.dtype))


@deep_families
@pytest.mark.parametrize("compiled", [None, "graph", "xla"])
def test_gradient_of_a_cache(family, compiled):
    """Of keys and values of a prefix, as by differences."""
    if compiled == "xla" and keras.config.backend() != "tensorflow":
        pytest.skip("what compiles on this backend is one")
    if compiled and keras.config.backend() == "torch":
        pytest.skip("torch derives eagerly")
    backbone = family.pair[0]
    cache = backbone.make_cache(2, 10)
    _, cache = backbone(
        {
            "token_ids": TOKENS[:, :PREFIX],
            "cache": cache,
            "cache_update_index": 0,
        }
    )
    arrays = [to_numpy(x) for x in tree.flatten(cache)]

    def loss(tensors):
        hidden_states, _ = backbone(
            {
                "token_ids": TOKENS[:, PREFIX:],
                "cache": tuple(zip(tensors[::2], tensors[1::2])),
                "cache_update_index": PREFIX,
            }
        )
        return loss_of(hidden_states)

    found = [to_numpy(x) for x in gradients(loss, arrays, compiled)]
    rng = np.random.default_rng(2)
    for _ in range(2):
        way = [rng.normal(size=x.shape).astype("float32") for x in arrays]
        expected = 0.0
        for step in (3e-2, -3e-2):
            moved = [x + step * y for x, y in zip(arrays, way)]
            moved = [ops.convert_to_tensor(x) for x in moved]
            expected += float(to_numpy(loss(moved))) / (2 * step)
        slope = sum(float((x * y).sum()) for x, y in zip(found, way))
        np.testing.assert_allclose(slope, expected, rtol=0.03, atol=1e-4)
    for x in found:
        assert np.abs(x[:, :, :PREFIX]).max() > 0
        assert (x[:, :, PREFIX:] == 0).all()


@deep_families
def test_gradient_through_a_cache(family):
    """Of all weights, in two calls as in one."""
    backbone = family.pair[0]
    variables = backbone.trainable_variables
    values = [to_numpy(x) for x in variables]

    def in_one_call():
        return loss_of(backbone({"token_ids": TOKENS}))

    def in_two_calls():
        parts, cache = [], backbone.make_cache(2, TOKENS.shape[1])
        for now in (slice(0, PREFIX), slice(PREFIX, None)):
            x, cache = backbone(
                {
                    "token_ids": TOKENS[:, now],
                    "cache": cache,
                    "cache_update_index": now.start,
                }
            )
            parts.append(x)
        return loss_of(ops.concatenate(parts, axis=1))

    def derive(loss):
        def function(tensors):
            mapping = list(zip(variables, tensors))
            with keras.StatelessScope(state_mapping=mapping):
                return loss()

        return gradients(function, values)

    pairs = zip(variables, derive(in_one_call), derive(in_two_calls))
    for variable, expected, found in pairs:
        if expected is None:  # What only the task uses, to return logits.
            assert found is None
            continue
        np.testing.assert_allclose(
            to_numpy(ops.convert_to_tensor(found)),
            to_numpy(ops.convert_to_tensor(expected)),
            atol=1e-5,
            rtol=1e-3,
            err_msg=variable.path,
        )
