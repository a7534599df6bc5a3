"""Attention by kernels of our own gives what attention to all slots gives."""

import contextlib
import importlib.util

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_nlp_cache import device
from keras_nlp_cache.attention import by_kernel
from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.masks import causal_mask
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.products.multiplying import multiplying_with
from keras_nlp_cache.products.packing import Weights
from tests.families import compiled_as_loops
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba"
)
ROWS, HEADS, SLOTS = 2, 2, 37
# What may differ, in parts of the largest number.
ROUNDING = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}


def fails(**kwargs):
    raise AssertionError("Expected a kernel to serve.")


def attended(query, key, value, mask, filled, **kwargs):
    """What a kernel computes, in what is compiled."""

    def function(query, key, value, mask, filled):
        return by_kernel.attend_by_kernel(
            query, key, value, mask, filled, otherwise=fails, **kwargs
        )

    filled = ops.convert_to_tensor(filled, "int32")
    return compiled_as_loops(function)(query, key, value, mask, filled)


def check(actual, expected, tolerance):
    actual, expected = (
        to_numpy(ops.cast(x, "float32")) for x in (actual, expected)
    )
    most = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance * most)


@settings(deadline=None, max_examples=20)
@given(
    dtype=st.sampled_from(list(ROUNDING)),
    in_eight_bits=st.booleans(),
    filled=st.lists(st.integers(3, SLOTS), min_size=ROWS, max_size=ROWS),
    length=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([8, 21]),
    soft_cap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 7]),
    has_sink=st.booleans(),
    has_bias=st.booleans(),
    few_heads=st.sampled_from([1, 8]),
    seed=st.integers(0, 2**16),
)
def test_equal(
    dtype,
    in_eight_bits,
    filled,
    length,
    groups,
    head_dim,
    soft_cap,
    window,
    has_sink,
    has_bias,
    few_heads,
    seed,
):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        x = rng.standard_normal(shape, dtype="float32")
        return ops.convert_to_tensor(x)

    queries = HEADS * groups
    query = ops.cast(numbers(ROWS, length, queries, head_dim), dtype)
    key, value = (numbers(ROWS, HEADS, SLOTS, head_dim) for _ in range(2))
    key, value = (
        Int8.of(x) if in_eight_bits else ops.cast(x, dtype)
        for x in (key, value)
    )
    # Each row has its tokens at a place of its own.
    token = np.array(filled)[:, None] - length + np.arange(length)
    distance = token[:, :, None] - np.arange(SLOTS)
    mask = causal_mask(ops.convert_to_tensor(distance), window)[:, None]
    further = {"scale": 0.35, "soft_cap": soft_cap}
    if has_sink:
        further["sink"] = numbers(queries)
    if has_bias:
        further["bias"] = numbers(1, queries, length, SLOTS)
    device.set_constants(few_heads=few_heads)
    try:
        actual = attended(query, key, value, mask, max(filled), **further)
    finally:
        device.set_constants()
    # It computes in float32, whatever it reads.
    query, key, value = (
        x if isinstance(x, Int8) else ops.cast(x, "float32")
        for x in (query, key, value)
    )
    expected = attend(query, key, value, mask, **further)
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    check(actual, expected, ROUNDING[dtype])


def test_reads_nothing_that_is_hidden():
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal(shape, dtype="float32")
        for shape in [(1, 2, 2, 8), (1, 2, SLOTS, 8), (1, 2, SLOTS, 8)]
    )
    mask = np.full((1, 1, 2, SLOTS), MASKED, "float32")
    mask[:, :, 0, 8:16] = 0
    seen = [x[:, :, 8:16].copy() for x in (key, value)]
    for x in (key, value):
        x[:, :, :8] = x[:, :, 16:] = np.nan
    actual = to_numpy(
        attended(
            *map(ops.convert_to_tensor, (query, key, value, mask)),
            filled=30,
            scale=1.0,
        )
    )
    expected = attend(
        *map(ops.convert_to_tensor, (query, *seen, mask[..., 8:16])), scale=1.0
    )
    check(actual[:, :1], expected[:, :1], 2e-6)
    # The other query sees nothing at all.
    np.testing.assert_array_equal(actual[:, 1], 0)


@pytest.mark.parametrize("policy", ["full", "int8"])
def test_a_decode_step_attends_by_kernel(policy, monkeypatch):
    served = []
    is_served = by_kernel._is_served

    def noted(*args):
        served.append(is_served(*args))
        return served[-1]

    monkeypatch.setattr(by_kernel, "_is_served", noted)
    family = FAMILIES[0]
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy", cache_policy=policy)
    token_ids = random_tokens(1, 9)
    mask = padding_mask([5], 9)
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    lm.generate(inputs, stop_token_ids=None)
    assert any(served)


def test_only_where_kernels_run():
    """Where a loop is not compiled by XLA, or on a GPU, there is no scope."""
    from keras_nlp_cache.cache.layer_cache import LayerCache
    from keras_nlp_cache.generate.loops.access import loop_access

    cache = LayerCache(
        key=ops.zeros((1, 1, 8, 4)), index=ops.convert_to_tensor(0)
    )
    for scope, is_ours in (
        (contextlib.nullcontext(), False),
        (multiplying_with(None, []), False),
        (multiplying_with(Weights({}), []), True),
    ):
        with scope:
            function = loop_access().attention(cache, 1).func
            assert (function is by_kernel.attend_by_kernel) == is_ours
