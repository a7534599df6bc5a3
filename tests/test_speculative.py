"""A draft model changes how fast tokens come, and nothing else."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_nlp_cache import surgery
from tests.families import deep_families
from tests.families import divided
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import XLA

LENGTH = 20
LENGTHS = [4, 9, 6]
PROMPTS = {
    "token_ids": random_tokens(3, LENGTH) * padding_mask(LENGTHS, LENGTH),
    "padding_mask": padding_mask(LENGTHS, LENGTH),
}
GPT2, LLAMA = FAMILIES[0], FAMILIES[3]


def draft_of(lm):
    """A model that is right now and then: its last block does too much."""
    return surgery.insert_before(lm, 1, keras.layers.Rescaling(1.5))


def tokens(lm, prompts=PROMPTS, **kwargs):
    kwargs.setdefault("stop_token_ids", None)
    return lm.generate(prompts, **kwargs)


def counting(lm, monkeypatch):
    """Counts how many tokens each check of the model gained, in each row."""
    gained = []
    verify = type(lm.generation_loop).verify

    def counted(loop, generation, *args):
        before = np.array(ops.convert_to_numpy(generation.index))
        result = verify(loop, generation, *args)
        after = np.array(ops.convert_to_numpy(result.index))
        gained.append((after - before).tolist())
        return result

    monkeypatch.setattr(type(lm.generation_loop), "verify", counted)
    return gained


@deep_families
def test_greedy_tokens_are_the_same(family, monkeypatch):
    lm = family.lm_pair[0]
    lm.compile(sampler="greedy", **XLA)
    expected = tokens(lm)
    gained = counting(lm, monkeypatch)
    result = tokens(lm, assistant_model=draft_of(lm))
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
    assert np.sum(gained, axis=0).tolist() == [LENGTH - x for x in LENGTHS]
    # Most families' drafts are right at times, and none always.
    assert 1 < len(gained) <= LENGTH - min(LENGTHS)


def test_the_model_itself_is_always_right(monkeypatch):
    lm = LLAMA.lm_pair[0]
    lm.compile(sampler="greedy", **XLA)
    expected = tokens(lm)
    gained = counting(lm, monkeypatch)
    result = tokens(lm, assistant_model=lm)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
    assert gained == [[6, 6, 6], [6, 5, 6], [4, 0, 2]]


def test_a_draft_that_knows_nothing(monkeypatch):
    """Of another family, and wrong: one token at a time, but the right one."""
    lm = LLAMA.lm_pair[0]
    lm.compile(sampler="greedy")
    draft = FAMILIES[1].lm_pair[0]
    draft.compile(sampler=keras_hub.samplers.RandomSampler(seed=1))
    expected = tokens(lm)
    gained = counting(lm, monkeypatch)
    result = tokens(lm, assistant_model=draft)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
    assert np.max(gained) < 6


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_upstreams_sampler_says_how_many(run_eagerly, monkeypatch):
    lm = LLAMA.lm_pair[0]
    lm.compile(sampler="greedy", run_eagerly=run_eagerly)
    expected = tokens(lm)
    lm.compile(
        sampler=keras_hub.samplers.SpeculativeSampler(num_speculative_tokens=2),
        run_eagerly=run_eagerly,
    )
    gained = counting(lm, monkeypatch)
    # The draft samples greedily, too.
    result = tokens(lm, assistant_model=lm)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
    assert [x for x, *_ in gained] == [3, 3, 3, 3, 3, 1]


def test_positions_that_were_learned():
    """Guessing stops where the model has no more positions."""
    lm = GPT2.lm_pair[0]
    lm.compile(sampler="greedy")
    limit = lm.backbone.max_sequence_length
    prompts = {
        "token_ids": np.pad(random_tokens(1, limit - 9), ((0, 0), (0, 9))),
        "padding_mask": padding_mask([limit - 9], limit),
    }
    expected = tokens(lm, prompts)
    result = tokens(lm, prompts, assistant_model=lm)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])


@functools.cache
def lm_and_draft():
    """Compiled once for all examples."""
    lm = LLAMA.task(LLAMA.pair[0], None)
    lm.compile(sampler="greedy")
    return lm, draft_of(lm)


@settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.data())
def test_any_prompts_and_stops(data):
    lm, draft = lm_and_draft()
    lengths = data.draw(
        st.lists(st.integers(1, LENGTH), min_size=3, max_size=3)
    )
    stops = data.draw(st.sets(st.integers(0, 99), min_size=1, max_size=60))
    seed = data.draw(st.integers(0, 1000))
    prompts = {
        "token_ids": random_tokens(3, LENGTH, seed)
        * padding_mask(lengths, LENGTH),
        "padding_mask": padding_mask(lengths, LENGTH),
    }
    kwargs = {"stop_token_ids": sorted(stops)}
    expected = tokens(lm, prompts, **kwargs)
    result = tokens(lm, prompts, **kwargs, assistant_model=draft)
    for name in ("token_ids", "padding_mask"):
        mask = expected["padding_mask"].astype(bool)
        np.testing.assert_array_equal(
            np.where(mask, result[name], 0), np.where(mask, expected[name], 0)
        )


def test_the_distribution_is_the_models():
    """Of the second token that is sampled, over many rows."""
    keras.utils.set_random_seed(3)
    lm, rows, k = LLAMA.lm_pair[0], 1500, 3
    lm.compile(sampler=keras_hub.samplers.TopKSampler(k=k, seed=5))
    draft = draft_of(lm)
    draft.compile(sampler="greedy")
    prompt = np.zeros((rows, 8), "int32")
    prompt[:, :4] = random_tokens(1, 4)
    mask = np.zeros((rows, 8), "int32")
    mask[:, :4] = 1
    prompts = {"token_ids": prompt, "padding_mask": mask}
    counts = []
    for assistant in (None, draft):
        new = tokens(lm, prompts, assistant_model=assistant)["token_ids"][:, 4:]
        pairs = new[:, 0].astype("int64") * 100 + new[:, 1]
        counts.append(pairs)
    values = np.unique(np.concatenate(counts))
    # At most k * k pairs can come up, and in both nearly all did.
    assert 3 < len(values) <= k * k
    shares = [np.array([(c == v).mean() for v in values]) for c in counts]
    # Five standard deviations of the difference of two shares.
    np.testing.assert_allclose(
        *shares, atol=5 * np.sqrt(2 * 0.25 / rows), rtol=0
    )


BAD = {
    "a model of upstream": (
        lambda: LLAMA.lm_pair[1],
        "greedy",
        r"`assistant_model`.*keras_nlp_cache.models.*keras_hub",
    ),
    "a backbone": (
        lambda: LLAMA.pair[0],
        "greedy",
        "`assistant_model`.*`CausalLM`.*Backbone",
    ),
    "another vocabulary": (
        lambda: LLAMA.task(LLAMA.backbone(vocabulary_size=99), None),
        "greedy",
        "vocabulary.*100 tokens.*99 tokens",
    ),
    "a sampler with a loop of its own": (
        lambda: LLAMA.lm_pair[0],
        "beam",
        "picks one token at a time.*BeamSampler",
    ),
    "no assistant": (
        lambda: None,
        keras_hub.samplers.SpeculativeSampler(),
        "`assistant_model`.*`SpeculativeSampler`.*None",
    ),
}


@pytest.mark.parametrize("name", divided(BAD))
def test_bad_assistants(name):
    assistant, sampler, match = BAD[name]
    lm = LLAMA.lm_pair[0]
    lm.compile(sampler=sampler)
    with pytest.raises(ValueError, match=match):
        tokens(lm, assistant_model=assistant())
    lm.compile(sampler="greedy")
    assert tokens(lm)["token_ids"].shape == (3, LENGTH)
