"""A call leaves the caller's cache alone; a loop updates its own in place."""

import numpy as np
from keras import ops

from tests.families import deep_families
from tests.families import random_tokens
from tests.families import to_numpy

TOKENS = random_tokens(2, 8)


def filled_cache(backbone):
    _, cache = backbone(
        {
            "token_ids": TOKENS[:, :5],
            "cache": backbone.make_cache(2, 8),
            "cache_update_index": 0,
        }
    )
    return cache


def arrays(cache):
    return [to_numpy(x).copy() for pair in cache for x in pair]


@deep_families
def test_a_call_does_not_modify_the_cache_it_gets(family):
    backbone = family.pair[0]
    cache = filled_cache(backbone)
    before = arrays(cache)
    inputs = {
        "token_ids": TOKENS[:, 5:6],
        "cache": cache,
        "cache_update_index": 5,
    }
    outputs = [to_numpy(backbone(inputs)[0]) for _ in range(2)]
    np.testing.assert_array_equal(*outputs)
    _, _, updated = family.lm_pair[0].call_with_cache(
        ops.convert_to_tensor(TOKENS[:, 5:6]), cache, 5
    )
    for old, now in zip(before, arrays(cache)):
        np.testing.assert_array_equal(old, now)
    assert any((old != new).any() for old, new in zip(before, arrays(updated)))


@deep_families
def test_only_the_new_slots_change(family):
    backbone = family.pair[0]
    cache = filled_cache(backbone)
    _, updated = backbone(
        {"token_ids": TOKENS[:, 5:7], "cache": cache, "cache_update_index": 5}
    )
    for old, new in zip(arrays(cache), arrays(updated)):
        changed = (old != new).any(axis=(0, 1, 3))
        assert changed.tolist() == [False] * 5 + [True] * 2 + [False]
