"""Attention to what is filled gives what attention to all slots gives."""

import types

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_nlp_cache.attention.blockwise import block_size
from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.masks import causal_mask
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.generate.loops.access import loop_access

BLOCK = block_size(256, 1)
SLOTS = (BLOCK, 2 * BLOCK, 3 * BLOCK, 2 * BLOCK + 8)


def behind(index, length, slots):
    """How far slots are behind tokens, `(T, S)`."""
    return index + np.arange(length)[:, None] - np.arange(slots)


def attend_filled(index, query, key, **kwargs):
    """Attends as a loop does that writes the tokens at a slot."""
    cache = LayerCache(key=key, index=ops.convert_to_tensor(index, "int32"))
    function = loop_access().attention(cache, query.shape[1]) or attend
    return function(query=query, key=key, **kwargs)


@settings(deadline=None, max_examples=20)
@given(
    slots=st.sampled_from(SLOTS),
    filled=st.floats(0, 1),
    length=st.sampled_from([1, 3]),
    soft_cap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 7]),
    has_sink=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equal(
    slots, filled, length, soft_cap, window, has_sink, has_bias, seed
):
    index = round(filled * (slots - length))
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(2, length, 4, 8)).astype("float32")
    key, value = rng.normal(size=(2, 2, 2, slots, 8)).astype("float32")
    # What lies past the filled slots is not to be looked at.
    key[:, :, index + length :] = value[:, :, index + length :] = 1e3
    query, key, value = map(ops.convert_to_tensor, (query, key, value))
    mask = causal_mask(behind(index, length, slots), window)[None, None]
    kwargs = dict(query=query, key=key, value=value, mask=mask, scale=0.35)
    further = {
        "soft_cap": soft_cap,
        "sink": rng.normal(size=4).astype("float32") if has_sink else None,
        "bias": (
            rng.normal(size=(1, 4, length, slots)).astype("float32")
            if has_bias
            else None
        ),
    }
    further = {
        name: ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in further.items()
    }
    expected = attend(**kwargs, **further)
    actual = attend_filled(index, **kwargs, **further)
    np.testing.assert_allclose(
        ops.convert_to_numpy(actual),
        ops.convert_to_numpy(expected),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_query_that_sees_nothing(dtype):
    x = ops.ones((1, 2, 2 * BLOCK, 4), dtype)
    query = ops.ones((1, 2, 4, 4), dtype)
    mask = np.zeros((1, 1, 2, 2 * BLOCK), "float32")
    mask[:, :, 1] = MASKED
    output = attend_filled(
        BLOCK + 1,
        query=query,
        key=x,
        value=x,
        mask=ops.convert_to_tensor(mask),
        scale=1.0,
    )
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    output = ops.convert_to_numpy(ops.cast(output, "float32"))
    np.testing.assert_allclose(output[:, 0], 1.0, rtol=1e-2)
    np.testing.assert_array_equal(output[:, 1], 0.0)


def test_an_accelerator_does_not_wait_for_the_host(monkeypatch):
    """Before each block it would. It reads all slots, in one go."""
    backend = keras.config.backend()
    if backend == "torch":
        pytest.skip("PyTorch reads a prefix, and waits for nobody")
    loops = []
    while_loop = ops.while_loop
    monkeypatch.setattr(
        ops, "while_loop", lambda *args: loops.append(1) or while_loop(*args)
    )
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(
        rng.normal(size=(1, 2, 2 * BLOCK, 4)).astype("float32")
    )
    index = BLOCK - 2

    def attended():
        mask = causal_mask(behind(index, 2, 2 * BLOCK))[None, None]
        return ops.convert_to_numpy(
            attend_filled(
                index,
                query=ops.ones((1, 2, 4, 4)),
                key=x,
                value=x,
                mask=mask,
                scale=1.0,
            )
        )

    expected = attended()
    assert loops == [1]
    if backend == "jax":
        monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    else:
        monkeypatch.setattr(
            "tensorflow.config.list_logical_devices",
            lambda kind=None: [types.SimpleNamespace(device_type="GPU")],
        )
    np.testing.assert_allclose(attended(), expected, atol=1e-5)
    assert loops == [1]
