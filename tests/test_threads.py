"""`generate()` from several threads gives each its own answer."""

import concurrent.futures

import numpy as np

from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens

LENGTH = 24


def prompt(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, size=1 + seed % 2)
    mask = padding_mask(lengths.tolist(), LENGTH)
    tokens = random_tokens(len(mask), LENGTH, seed=seed)
    return {"token_ids": tokens * mask, "padding_mask": mask}


@in_turn("cold", [True, False, True])
def test_each_thread_gets_its_own_answer(family, cold):
    lm = family.lm_pair[0]
    prompts = [prompt(seed) for seed in range(8)]

    def generate(prompt):
        return lm.generate(prompt, stop_token_ids=None)["token_ids"]

    lm.compile(sampler="greedy")
    expected = [generate(x) for x in prompts]
    if cold:
        lm.compile(sampler="greedy")  # All compile at the same time.
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        actual = list(threads.map(generate, prompts))
    for x, y in zip(actual, expected):
        np.testing.assert_array_equal(x, y)
