"""`generate()` from several threads gives each its own answer."""

import concurrent.futures
import threading

import numpy as np

from keras_nlp_cache.kernels.once import once
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


def test_what_is_done_once_is_done_by_one_thread():
    calls, together = [], threading.Barrier(4)

    @once
    def slow(x):
        calls.append(x)
        # Others would begin in the meantime.
        threading.Event().wait(0.05)
        return [x]

    def ask(_):
        together.wait()
        return slow(1)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(4)))
    assert calls == [1]
    assert all(x is answers[0] for x in answers)
