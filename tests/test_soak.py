"""Many calls take no more memory than some."""

import gc

import numpy as np
import psutil
import pytest

from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import XLA

CALLS, WARM_UP = 200, 50


@pytest.mark.parametrize(
    "family", [FAMILIES[0], FAMILIES[3]], ids=["gpt2", "llama"]
)
def test_memory_does_not_grow(family):
    """200 calls of any batch, prompts and length, greedy and sampled."""
    process = psutil.Process()
    rng = np.random.default_rng(0)
    lm = family.task(backbone=family.backbone(), preprocessor=None)
    lm.compile(sampler="top_k", **XLA)
    for call in range(CALLS):
        if call == WARM_UP:
            gc.collect()
            warm = process.memory_info().rss
        batch, length = rng.integers(1, 4), rng.integers(12, 48)
        lengths = rng.integers(1, 12, batch)
        mask = padding_mask(lengths, length)
        tokens = random_tokens(batch, length, seed=call) * mask
        stop = None if call % 2 else rng.integers(0, 100, 3).tolist()
        output = lm.generate(
            {"token_ids": tokens, "padding_mask": mask}, stop_token_ids=stop
        )
        kept = output["token_ids"][mask.astype(bool)]
        np.testing.assert_array_equal(kept, tokens[mask.astype(bool)])
    gc.collect()
    assert process.memory_info().rss <= 1.05 * warm
