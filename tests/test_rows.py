"""A row of a batch, wherever it stands, is what it is alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

from tests.families import compiled
from tests.families import each_kind
from tests.families import examples
from tests.families import padding_mask
from tests.families import PATCHED
from tests.families import random_tokens
from tests.families import to_numpy

# Long enough for the few places of a window to be taken several times.
LENGTH, SLOTS = 40, 48
# Arguments of `make_cache()`.
POLICIES = {"full": {}}
if not PATCHED:
    from keras_nlp_cache.cache import policies

    POLICIES |= {
        "int8": {"policy": "int8"},
        "rotating": {"policy": "rotating"},
        "rotating_int8": {"policy": policies.Rotating("int8")},
        "sinks": {"policy": policies.SinksAndWindow(sinks=2, window=6)},
    }
# Those that lose nothing that a model sees.
EXACT = ("full", "rotating")

property_test = settings(
    max_examples=examples(8),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _few_places(monkeypatch):
    """Small models have small windows."""
    if not PATCHED:
        monkeypatch.setattr(policies.rotating, "SPARE", 8)


@st.composite
def rows(draw):
    """How a batch of rows is read: first lengths, and calls after that."""
    prompt = draw(st.sampled_from((1, 5, 9)))
    firsts = draw(st.lists(st.integers(1, prompt), min_size=3, max_size=3))
    calls = draw(st.lists(st.sampled_from((1, 1, 1, 7)), max_size=12))
    return prompt, tuple(firsts), tuple(calls)


def read(backbone, token_ids, prompt, firsts, calls, policy):
    """Reads a prompt of each row, then more tokens, each row at its place.

    Returns:
        Dictionary from `(row, slot)` to hidden states.
    """
    batch = len(token_ids)
    cache = backbone.make_cache(batch, SLOTS, **policy)
    call = compiled(backbone)
    index, states = np.array(firsts), {}
    inputs = {"cache": cache, "cache_update_index": 0}
    if not PATCHED and backbone.has_states:
        # A state has to be told where rows end.
        inputs["padding_mask"] = padding_mask(firsts, SLOTS)
    x, cache = call({"token_ids": token_ids[:, :prompt], **inputs})
    for row, length in enumerate(firsts):
        for i in range(length):
            states[row, i] = to_numpy(x)[row, i]
    for size in calls:
        if index.max() + size > LENGTH:
            break
        now = index[:, None] + np.arange(size)
        inputs = {"cache": cache, "cache_update_index": index.astype("int32")}
        tokens = np.take_along_axis(token_ids, now, axis=1)
        x, cache = call({"token_ids": tokens, **inputs})
        for (row, i), slot in np.ndenumerate(now):
            states[row, slot] = to_numpy(x)[row, i]
        index = index + size
    return states


def assert_rows_equal(backbone, case, policy, seed=0):
    token_ids = random_tokens(3, LENGTH, seed)
    prompt, firsts, calls = case
    states = read(backbone, token_ids, *case, POLICIES[policy])
    if policy in EXACT:
        # What there is without a cache, it is alone, too.
        full = to_numpy(compiled(backbone)({"token_ids": token_ids}))
        for (row, slot), x in states.items():
            np.testing.assert_allclose(x, full[row, slot], atol=2e-5, rtol=2e-5)
        return
    for row in range(3):
        alone = read(
            backbone,
            token_ids[row : row + 1],
            prompt,
            firsts[row : row + 1],
            calls,
            POLICIES[policy],
        )
        for (_, slot), x in alone.items():
            if (row, slot) in states:
                np.testing.assert_allclose(
                    states[row, slot], x, atol=2e-5, rtol=2e-5
                )


@each_kind
@property_test
@given(case=rows(), policy=st.sampled_from(sorted(POLICIES)))
def test_rows(family, case, policy):
    backbone, _ = family.pair
    if policy == "sinks" and backbone.max_positions is not None:
        policy = "full"
    assert_rows_equal(backbone, case, policy)
