"""`generate()` gives upstream's tokens."""

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from parameterized import parameterized

from tests.families import assert_greedy_after
from tests.families import compiled
from tests.families import deep_families
from tests.families import each_kind
from tests.families import every_family
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import PATCHED
from tests.families import random_tokens

LENGTH = 16
PROMPTS = {
    "token_ids": random_tokens(3, LENGTH) * padding_mask([4, 9, 6], LENGTH),
    # Gemma 3 of keras_hub takes no integers.
    "padding_mask": padding_mask([4, 9, 6], LENGTH).astype(bool),
}
SAMPLERS = {
    "greedy": lambda: keras_hub.samplers.GreedySampler(),
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=5, seed=7),
    "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.8, seed=7),
    "random": lambda: keras_hub.samplers.RandomSampler(seed=7, temperature=2.0),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3),
}
DRAWING = ("top_k", "top_p", "random")


def generate_both(lms, inputs, sampler, **kwargs):
    for lm in lms:
        lm.compile(sampler=SAMPLERS[sampler]())
    return generate_again(lms, inputs, **kwargs)


def generate_again(lms, inputs, **kwargs):
    """With what was compiled before."""
    return [lm.generate(inputs, **kwargs) for lm in lms]


@every_family
def test_tokens(family):
    assert_same_tokens(family, "greedy")


@in_turn("sampler", ("beam", "contrastive", *(DRAWING if PATCHED else ())))
def test_tokens_of_other_samplers(family, sampler):
    assert_same_tokens(family, sampler)


@pytest.mark.skipif(PATCHED, reason="upstream draws for all rows at once")
@in_turn("sampler", DRAWING)
def test_rows_are_sampled_as_if_alone(family, sampler):
    """Each row as upstream alone, with a seed that its number makes."""
    from keras_nlp_cache.generate.loops.sampling import streams

    ours, upstream = family.lm_pair
    ours.compile(sampler=SAMPLERS[sampler]())
    together = ours.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    for row in range(3):
        one = SAMPLERS[sampler]()
        (state,) = streams(one, [row])
        one.seed_generator.state.assign(state)
        upstream.compile(sampler=one)
        prompt = {name: x[row : row + 1] for name, x in PROMPTS.items()}
        alone = upstream.generate(prompt, stop_token_ids=None)["token_ids"]
        np.testing.assert_array_equal(together[row], alone[0])
    again = ours.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    assert (again != together).any()


def assert_same_tokens(family, sampler):
    if family.decodes_wrong:
        (ours,) = generate_both(
            family.lm_pair[:1], PROMPTS, sampler, stop_token_ids=None
        )
        assert_greedy_after(PROMPTS, ours["token_ids"], family.lm_pair[0])
        return
    ours, upstream = generate_both(
        family.lm_pair, PROMPTS, sampler, stop_token_ids=None
    )
    np.testing.assert_array_equal(ours["token_ids"], upstream["token_ids"])
    np.testing.assert_array_equal(
        ours["padding_mask"], upstream["padding_mask"]
    )
    # Prompts are kept, and something follows them.
    kept = PROMPTS["padding_mask"].astype(bool)
    np.testing.assert_array_equal(
        ours["token_ids"][kept], PROMPTS["token_ids"][kept]
    )
    assert np.unique(ours["token_ids"][~kept]).size > 1


@deep_families
def test_stop_tokens(family):
    (free,) = generate_both(
        family.lm_pair[:1], PROMPTS, "greedy", stop_token_ids=None
    )
    # The third token that follows each prompt.
    lengths = PROMPTS["padding_mask"].sum(axis=-1)
    stop = free["token_ids"][np.arange(3), lengths + 2]
    for lm in family.lm_pair:
        lm.compile(sampler="greedy")
    for kwargs in ({}, {"strip_prompt": True}):
        ours, upstream = generate_again(
            family.lm_pair,
            PROMPTS,
            stop_token_ids=[int(x) for x in stop],
            **kwargs,
        )
        is_text = ours["padding_mask"].astype(bool)
        np.testing.assert_array_equal(is_text, upstream["padding_mask"])
        np.testing.assert_array_equal(
            ours["token_ids"][is_text], upstream["token_ids"][is_text]
        )
        end = ours["padding_mask"].astype(bool).sum(axis=-1)
        assert (end <= lengths + 3).all()


def _lms_with_text(family):
    preprocessor = family.preprocessor(sequence_length=LENGTH)
    backbone = family.backbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size()
    )
    upstream = family.upstream_backbone(
        backbone, vocabulary_size=preprocessor.tokenizer.vocabulary_size()
    )
    return (
        family.task(backbone, preprocessor),
        family.upstream_task(upstream, preprocessor),
    )


@deep_families
def test_text(family):
    lms = _lms_with_text(family)
    for lm in lms:
        lm.compile(sampler="greedy")
    prompts = ["the fox", "what is the capital", "a"]
    for inputs in (prompts, prompts[0]):
        for kwargs in (
            {"max_length": 24},
            {"max_length": 24, "stop_token_ids": None},
            {"max_length": 24, "strip_prompt": True},
        ):
            ours, upstream = generate_again(lms, inputs, **kwargs)
            assert ours == upstream
            assert isinstance(ours, type(inputs))


@deep_families
def test_datasets(family):
    data = {name: x[:, :LENGTH] for name, x in PROMPTS.items()}
    data = tf.data.Dataset.from_tensor_slices(data).batch(2)
    ours, upstream = generate_both(
        family.lm_pair, data, "greedy", stop_token_ids=None
    )
    np.testing.assert_array_equal(ours["token_ids"], upstream["token_ids"])
    assert len(ours["token_ids"]) == 3


@each_kind
def test_call_with_cache(family):
    """The signature and the results that upstream's method has."""
    ours, upstream = family.lm_pair
    token_ids = PROMPTS["token_ids"][:, :4]
    token_ids = ops.convert_to_tensor(token_ids)
    cache = ours.backbone.make_cache(3, LENGTH)
    call = compiled(ours.call_with_cache)
    logits, hidden_states, cache = call(token_ids, cache, 0)
    full = compiled(upstream)(
        {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)}
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(logits),
        ops.convert_to_numpy(full),
        atol=1e-4,
        rtol=1e-4,
    )
    assert hidden_states.shape[:2] == (3, 4)
    assert hidden_states.shape[2:] == ours.backbone.output.shape[2:]
    assert len(cache) == len(ours.backbone.make_cache(1, 1))


@parameterized.expand([(True,), (False,)])
def test_run_eagerly(run_eagerly):
    ours, upstream = FAMILIES[0].lm_pair
    results = []
    for lm in (ours, upstream):
        lm.compile(sampler="greedy", run_eagerly=run_eagerly)
        results.append(lm.generate(PROMPTS, stop_token_ids=None))
    np.testing.assert_array_equal(
        results[0]["token_ids"], results[1]["token_ids"]
    )


class SecondBest(keras_hub.samplers.Sampler):
    """A user's sampler that picks tokens."""

    def get_next_token(self, probabilities):
        return ops.top_k(probabilities, k=2)[1][:, 1]


class Repeating(keras_hub.samplers.Sampler):
    """A user's sampler with a loop of its own, which calls the model once."""

    def __call__(self, next, prompt, cache, index, mask, **kwargs):
        logits, _, _ = next(prompt, cache, index)
        token = ops.cast(ops.argmax(logits, axis=-1), prompt.dtype)
        return ops.where(mask, prompt, token[:, None])


@in_turn("sampler", [SecondBest, Repeating])
def test_samplers_of_users(family, sampler):
    results = []
    for lm in family.lm_pair:
        lm.compile(sampler=sampler())
        output = lm.generate(PROMPTS, stop_token_ids=None)
        results.append(output["token_ids"])
        lm.compile(sampler="greedy")
        greedy = lm.generate(PROMPTS, stop_token_ids=None)
        assert (output["token_ids"] != greedy["token_ids"]).any()
    np.testing.assert_array_equal(*results)
