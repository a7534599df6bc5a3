"""Decoding through a cache, in any split, equals the full forward pass."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from tests.families import call_by_hand
from tests.families import compiled
from tests.families import decode
from tests.families import deep_families
from tests.families import each_kind
from tests.families import every_family
from tests.families import examples
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

ATOL = 1e-5

# Shapes are few so that what a backend compiles for one is used again.
LENGTH = 10
property_test = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Of each family.
short_property_test = settings(property_test, max_examples=examples(5))


@st.composite
def splits(draw):
    """Sizes of calls that add up to `LENGTH`."""
    sizes, left = [], LENGTH
    while left:
        sizes.append(draw(st.sampled_from([n for n in (7, 2, 1) if n <= left])))
        left -= sizes[-1]
    return tuple(sizes)


def upstream_full(family, token_ids, mask=None):
    mask = np.ones_like(token_ids) if mask is None else mask
    call = compiled(family.pair[1])
    return to_numpy(call({"token_ids": token_ids, "padding_mask": mask}))


@every_family
def test_equals_upstream_forward(family):
    sizes = (1, 2, 7)
    token_ids = random_tokens(2, LENGTH)
    np.testing.assert_allclose(
        decode(family.pair[0], token_ids, sizes),
        upstream_full(family, token_ids),
        atol=family.tolerance,
        rtol=family.tolerance,
    )


@each_kind
def test_left_padding_by_positions(family):
    """A row that is padded on the left is as if it were not padded."""
    token_ids = random_tokens(2, LENGTH)
    mask = np.ones_like(token_ids)
    mask[1, :3] = 0
    output = decode(
        family.pair[0],
        token_ids,
        (1, 2, 7),
        padding_mask=mask,
        token_positions=np.cumsum(mask, axis=1) - mask,
    )
    full = upstream_full(family, token_ids)
    # Causal, so that what follows the text does not matter.
    moved = np.roll(token_ids[1:], -3, axis=1)
    alone = upstream_full(family, np.concatenate([token_ids[:1], moved]))
    np.testing.assert_allclose(
        output[0], full[0], atol=family.tolerance, rtol=family.tolerance
    )
    np.testing.assert_allclose(
        output[1, 3:],
        alone[1, :-3],
        atol=family.tolerance,
        rtol=family.tolerance,
    )


@each_kind
def test_depends_on_what_was_cached(family):
    token_ids = random_tokens(2, LENGTH)
    changed = token_ids.copy()
    changed[0, 0] += 1
    one = decode(family.pair[0], token_ids, (1, 2, 7))
    other = decode(family.pair[0], changed, (1, 2, 7))
    # Far above what the equalities of this module tolerate.
    assert np.abs(one[0, 3] - other[0, 3]).max() > 100 * ATOL


@deep_families
@property_test
@given(
    sizes=splits() | st.just((LENGTH,)),
    batch_and_room=st.sampled_from([(2, 0), (1, 6)]),
    seed=st.integers(0, 99),
)
def test_any_split(family, sizes, batch_and_room, seed):
    batch, room = batch_and_room
    token_ids = random_tokens(batch, LENGTH, seed)
    np.testing.assert_allclose(
        decode(family.pair[0], token_ids, sizes, LENGTH + room),
        upstream_full(family, token_ids),
        atol=ATOL,
        rtol=ATOL,
    )


@deep_families
@property_test
@given(sizes=splits(), lengths=st.tuples(*[st.integers(1, LENGTH)] * 2))
def test_padding(family, sizes, lengths):
    token_ids = random_tokens(2, LENGTH)
    mask = padding_mask(lengths, LENGTH)
    np.testing.assert_allclose(
        decode(family.pair[0], token_ids, sizes, padding_mask=mask),
        upstream_full(family, token_ids, mask),
        atol=ATOL,
        rtol=ATOL,
    )


@each_kind
@short_property_test
@given(
    sizes=st.none() | splits(),
    place=st.integers(0, LENGTH - 4),
    start=st.sampled_from([0, 7]),
    seed=st.integers(0, 99),
)
def test_padding_by_positions(family, sizes, place, start, seed):
    """Padded on the left or inside, rows are as if there were no padding.

    With a cache and without one (`sizes=None`), wherever the text starts.
    """
    token_ids = random_tokens(2, LENGTH, seed)
    mask = np.ones_like(token_ids)
    mask[1, place : place + 3] = 0
    inputs = {
        "padding_mask": mask,
        "token_positions": start + np.cumsum(mask, axis=1) - mask,
    }
    if sizes is None:
        call = compiled(family.pair[0])
        output = to_numpy(call({"token_ids": token_ids, **inputs}))
    else:
        output = decode(family.pair[0], token_ids, sizes, **inputs)
    for row in range(2):
        real = np.flatnonzero(mask[row])
        alone = compiled(family.pair[0])(
            {
                "token_ids": token_ids[row : row + 1, real],
                "token_positions": start + np.arange(len(real))[None, :],
            }
        )
        np.testing.assert_allclose(
            output[row : row + 1, real],
            to_numpy(alone),
            atol=family.tolerance,
            rtol=family.tolerance,
        )
        if start == 0:
            np.testing.assert_allclose(
                to_numpy(alone),
                upstream_full(family, token_ids[row : row + 1, real]),
                atol=family.tolerance,
                rtol=family.tolerance,
            )


@each_kind
@short_property_test
@given(sizes=splits(), seed=st.integers(0, 99))
def test_positions_and_attention_mask(family, sizes, seed):
    """With all optional inputs, a cache changes nothing."""
    if family.keeps_states:
        pytest.skip("a state cannot be seen in part, which test_states.py asks")
    assert_equal_with_all_inputs(family, sizes, seed, "bool")


@in_turn("kind", ["int32", "float32"])
@short_property_test
@given(sizes=splits(), seed=st.integers(0, 99))
def test_other_attention_masks(family, kind, sizes, seed):
    assert_equal_with_all_inputs(family, sizes, seed, kind)


def assert_equal_with_all_inputs(family, sizes, seed, kind):
    rng = np.random.default_rng(seed)
    token_ids = random_tokens(2, LENGTH, seed)
    positions = np.sort(rng.integers(0, 30, (2, LENGTH)), axis=-1)
    if family.measures_distance:
        # A cache does not remember gaps.
        positions = positions[:, :1] + np.arange(LENGTH)
    seen = rng.random((2, LENGTH, LENGTH)) < 0.7
    seen |= np.eye(LENGTH, dtype=bool)
    mask = seen.astype(kind)
    if kind == "float32":
        mask = np.where(seen, -rng.random(seen.shape), -np.inf).astype(kind)
    inputs = {"token_positions": positions, "attention_mask": mask}
    full = compiled(family.pair[0])({"token_ids": token_ids, **inputs})
    np.testing.assert_allclose(
        decode(family.pair[0], token_ids, sizes, **inputs),
        to_numpy(full),
        atol=ATOL,
        rtol=ATOL,
    )


@deep_families
def test_attention_mask_hides(family):
    """A mask over a column does what padding at that position does."""
    token_ids = random_tokens(2, LENGTH)
    padding = np.ones((2, LENGTH), "int32")
    padding[:, 4] = 0
    mask = np.broadcast_to(padding[:, None], (2, LENGTH, LENGTH))
    call = compiled(family.pair[0])
    output = call({"token_ids": token_ids, "attention_mask": mask})
    np.testing.assert_allclose(
        to_numpy(output),
        upstream_full(family, token_ids, padding),
        atol=ATOL,
        rtol=ATOL,
    )


@deep_families
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_a_token_that_sees_nothing(family, kind):
    """It gets finite outputs, and does not disturb the others."""
    token_ids = random_tokens(2, LENGTH)
    mask = np.ones((2, LENGTH, LENGTH), bool)
    mask[:, 4] = False
    mask[:, :, 4] = False
    if kind == "float32":
        mask = np.where(mask, 0, -np.inf).astype(kind)
    call = compiled(family.pair[0])
    output = to_numpy(call({"token_ids": token_ids, "attention_mask": mask}))
    assert np.isfinite(output).all()
    padding = np.ones((2, LENGTH), "int32")
    padding[:, 4] = 0
    others = np.arange(LENGTH) != 4
    np.testing.assert_allclose(
        output[:, others],
        upstream_full(family, token_ids, padding)[:, others],
        atol=ATOL,
        rtol=ATOL,
    )


@in_turn("dtype", 3 * ["bfloat16"] + ["mixed_bfloat16", "float16"])
def test_reduced_precision(family, dtype):
    """Our error against float32 is upstream's, not more."""
    token_ids = random_tokens(4, LENGTH)
    exact = upstream_full(family, token_ids)
    ours = family.backbone(dtype=dtype)
    ours.set_weights(family.pair[0].get_weights())
    upstream = family.upstream_backbone(ours, dtype=dtype)
    lm = family.upstream_task(upstream, None)
    build_cache = compiled(lm._build_cache)
    call_with_cache = compiled(lm.call_with_cache)
    hidden_states, cache = build_cache(
        ops.convert_to_tensor(np.pad(token_ids[:, :5], ((0, 0), (0, 5))))
    )
    expected = [to_numpy(hidden_states)[:, :5]]
    for i in range(5, LENGTH):
        step = ops.convert_to_tensor(token_ids[:, i : i + 1])
        _, hidden_states, cache = call_with_cache(step, cache, i)
        expected.append(to_numpy(hidden_states))

    def error(x):
        return np.sqrt(np.mean((x - exact) ** 2))

    output = decode(ours, token_ids, (5, 1, 1, 1, 1, 1))
    assert error(output) <= 1.1 * error(np.concatenate(expected, axis=1))


@deep_families
def test_cache_of_another_dtype(family):
    """A half-size cache is kept as such and costs its rounding, no more."""
    backbone = family.pair[0]
    token_ids = random_tokens(2, LENGTH)
    cache = backbone.make_cache(2, LENGTH, dtype="bfloat16")
    inputs = {"token_ids": token_ids, "cache": cache, "cache_update_index": 0}
    hidden_states, cache = compiled(backbone)(inputs)
    assert keras.backend.standardize_dtype(hidden_states.dtype) == "float32"
    for tensor in (x for pair in cache for x in pair):
        assert keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
    error = to_numpy(hidden_states) - upstream_full(family, token_ids)
    assert 0 < np.abs(error).max() < 0.2


@deep_families
def test_blocks_called_by_hand(family):
    """Without a cache a tensor as upstream, with one a pair beside it."""
    block = family.pair[0].transformer_layers[0]
    x = np.random.default_rng(0).normal(size=(2, 8, 32)).astype("float32")
    full = block(ops.convert_to_tensor(x))
    assert ops.is_tensor(full)
    cache = family.pair[0].make_cache(2, 8)[0]
    outputs = []
    for i in range(8):
        output, cache = call_by_hand(
            block, ops.convert_to_tensor(x[:, i : i + 1]), cache, i
        )
        outputs.append(to_numpy(output))
    np.testing.assert_allclose(
        np.concatenate(outputs, axis=1), to_numpy(full), atol=ATOL, rtol=ATOL
    )
