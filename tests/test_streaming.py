"""Streaming gives the text of `generate()`, as it is produced."""

import itertools

import keras_hub
import numpy as np
import pytest

from keras_nlp_cache import models
from keras_nlp_cache import stream
from keras_nlp_cache.streaming import stream_tokens
from tests.families import every_family
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens

LENGTH = 16
PROMPT = random_tokens(1, 5)


def lm_with_text(family):
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.ours("CausalLM")(
        family.backbone(vocabulary_size=size), preprocessor
    )
    lm.compile(sampler="greedy")
    return lm


@every_family
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_tokens_are_those_of_generate(family, run_eagerly):
    lm = family.lm_pair[0]
    lm.compile(sampler="greedy", run_eagerly=run_eagerly)
    streamed = list(stream_tokens(lm, PROMPT[0], LENGTH - 5))
    prompt = {
        "token_ids": np.pad(PROMPT, ((0, 0), (0, LENGTH - 5))),
        "padding_mask": padding_mask([5], LENGTH),
    }
    expected = lm.generate(prompt, stop_token_ids=None)["token_ids"][0, 5:]
    assert streamed == expected.tolist()


@every_family
def test_text_is_that_of_generate(family):
    lm = lm_with_text(family)
    prompt = "the fox"
    pieces = [piece for piece, _ in stream(lm, prompt, 12)]
    x = lm.preprocessor.generate_preprocess([prompt], sequence_length=40)
    start = int(np.sum(np.array(x["padding_mask"])))
    expected = lm.generate(prompt, max_length=start + 12, strip_prompt=True)
    assert "".join(pieces) == expected


@every_family
def test_can_be_left_early(family):
    lm = lm_with_text(family)
    whole = list(stream(lm, "the fox", 6, stop_token_ids=None))
    some = list(
        itertools.islice(stream(lm, "the fox", 6, stop_token_ids=None), 3)
    )
    assert some == whole[:3]
    assert [count for _, count in whole] == [1, 2, 3, 4, 5, 6]


@every_family
def test_a_seeded_sampler_repeats_itself(family):
    lm = family.lm_pair[0]
    runs = []
    for _ in range(2):
        lm.compile(
            sampler=keras_hub.samplers.RandomSampler(temperature=5.0, seed=3)
        )
        runs.append(list(stream_tokens(lm, PROMPT[0], 8)))
    assert runs[0] == runs[1]
    # The seed advances from one call to the next.
    assert list(stream_tokens(lm, PROMPT[0], 8)) != runs[0]


def test_mistakes():
    lm = FAMILIES[0].lm_pair[0]
    with pytest.raises(ValueError, match="`preprocessor`"):
        list(stream(lm, "text"))
    lm = lm_with_text(FAMILIES[0])
    with pytest.raises(ValueError, match="`max_new_tokens`.*0"):
        list(stream(lm, "the fox", 0))
    with pytest.raises(ValueError, match="64 positions"):
        list(stream(lm, "the fox", 64))
    with pytest.raises(ValueError, match="at least one token"):
        list(stream_tokens(lm, np.zeros((0,), "int32"), 4))


def test_whole_characters_and_the_text_of_a_real_model(smollm2):
    """SmolLM2 spells an emoji with several tokens."""
    lm = models.CausalLM.from_preset(smollm2)
    lm.compile(sampler="greedy")
    prompt = "🙂🙃🙂🙃🙂🙃🙂🙃"
    pieces = [piece for piece, _ in stream(lm, prompt, 24, None)]
    assert "" in pieces, "some token should have been half a character"
    assert not any("\N{REPLACEMENT CHARACTER}" in x for x in pieces[:-1])
    assert "🙃" in "".join(pieces)
