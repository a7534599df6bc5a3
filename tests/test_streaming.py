"""Streaming gives the text of `generate()`, as it is produced."""

import itertools

import keras_hub
import numpy as np
import pytest
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from keras_nlp_cache import models
from keras_nlp_cache.generate.pieces import TextPieces
from tests import text
from tests.families import deep_families
from tests.families import in_turn
from tests.families import in_words
from tests.families import padding_mask
from tests.families import random_tokens

LENGTH = 16
# Of the few tokens that the tests' tokenizers know.
PROMPT = random_tokens(1, 5) % 16 + 1


def lm_with_text(family, **kwargs):
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.task(
        family.backbone(vocabulary_size=size, **kwargs), preprocessor
    )
    lm.compile(sampler="greedy")
    return lm


@in_turn("run_eagerly", [False, True])
def test_tokens_are_those_of_generate(family, run_eagerly):
    lm = lm_with_text(family)
    lm.compile(sampler="greedy", run_eagerly=run_eagerly)
    session = lm.start_session()
    streamed = list(session.stream_tokens(PROMPT[0], LENGTH - 5))
    lm.preprocessor = None
    prompt = {
        "token_ids": np.pad(PROMPT, ((0, 0), (0, LENGTH - 5))),
        "padding_mask": padding_mask([5], LENGTH),
    }
    expected = lm.generate(prompt, stop_token_ids=None)["token_ids"][0, 5:]
    assert streamed == expected.tolist()


@deep_families
def test_text_is_that_of_generate(family):
    lm = lm_with_text(family)
    prompt = "the fox"
    pieces = list(lm.stream(prompt, 12))
    x = lm.preprocessor.generate_preprocess([prompt], sequence_length=40)
    start = int(np.sum(np.array(x["padding_mask"])))
    expected = lm.generate(prompt, max_length=start + 12, strip_prompt=True)
    assert "".join(pieces) == expected


# Whose tokenizer it takes, what it calls the ends of a text and of a turn, and
# arguments of its tokenizer and its backbone.
TURNS = {
    "Gemma3": (
        "Gemma",
        ("<eos>", "<end_of_turn>"),
        dict(has_vision_tokens=False),
        dict(head_dim=8, image_size=None),
    ),
    "Phi3": ("Llama", ("<|endoftext|>", "<|end|>"), {}, {}),
}


@pytest.mark.parametrize("prefix", TURNS)
def test_a_turn_ends_where_it_does_in_generate(prefix):
    spelled_like, (end, turn_end), options, config = TURNS[prefix]
    vocabulary = sentencepiece_model_pb2.ModelProto.FromString(
        text.tokenizer_arguments(spelled_like)["proto"]
    )
    vocabulary.pieces[vocabulary.trainer_spec.eos_id].piece = end
    backbone = getattr(models, f"{prefix}Backbone")(
        vocabulary_size=len(vocabulary.pieces),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        **config,
    )
    # The same on all backends, and an answer that does not repeat the prompt.
    rng = np.random.default_rng(0)
    for weight in backbone.weights:
        weight.assign(rng.normal(size=weight.shape))

    def make_lm():
        tokenizer = getattr(keras_hub.models, f"{prefix}Tokenizer")(
            proto=vocabulary.SerializeToString(), **options
        )
        preprocessor = getattr(
            keras_hub.models, f"{prefix}CausalLMPreprocessor"
        )(tokenizer=tokenizer, sequence_length=LENGTH)
        lm = getattr(models, f"{prefix}CausalLM")(
            backbone=backbone, preprocessor=preprocessor
        )
        lm.compile(sampler="greedy")
        return lm

    session = make_lm().start_session()
    whole = session.send("the", 8, stop_token_ids=None)
    prompt, answer = session.token_ids[:-8], session.token_ids[-8:]
    new = next(x for x in answer[1:] if x > 3 and x not in prompt)
    vocabulary.pieces[new].piece = turn_end
    lm = make_lm()
    streamed = "".join(lm.stream("the", 8))
    assert len(streamed) < len(whole)
    # Upstream leaves the end of a turn in its text.
    assert streamed + turn_end == lm.generate(
        "the", max_length=len(prompt) + 8, strip_prompt=True
    )


@deep_families
def test_can_be_left_early(family):
    lm = lm_with_text(family)
    whole = list(lm.stream("the fox", 6, stop_token_ids=None))
    some = itertools.islice(lm.stream("the fox", 6, stop_token_ids=None), 3)
    assert list(some) == whole[:3]
    assert len(whole) == 6


@deep_families
def test_a_seeded_sampler_repeats_itself(family):
    lm = lm_with_text(family)

    def compile():
        lm.compile(
            sampler=keras_hub.samplers.RandomSampler(temperature=5.0, seed=3)
        )

    def tokens():
        return list(lm.start_session().stream_tokens(PROMPT[0], 8))

    compile()
    first = tokens()
    # The seed advances from one call to the next.
    assert tokens() != first
    compile()
    assert tokens() == first


CHARACTERS = "aé€🙂 "


@example("a" + 30 * "🙂", 2)  # No token ends where a character does.
@given(st.text(CHARACTERS, max_size=60), st.integers(1, 5))
def test_pieces(text, size):
    """Whatever bytes a token has, pieces are whole and make up the text."""
    data = text.encode()
    tokens = [data[i : i + size] for i in range(0, len(data), size)]
    read = []

    def detokenize(window):
        read.append(len(window))
        return b"".join(window).decode(errors="replace")

    pieces = TextPieces(detokenize)
    shown = [pieces.add(token) for token in tokens]
    assert not any("\N{REPLACEMENT CHARACTER}" in x for x in shown)
    assert "".join(shown) + pieces.rest() == text
    assert max(read, default=0) <= TextPieces.longest + 4


@in_words
def test_whole_characters_and_the_text_of_a_real_model(smollm2):
    """SmolLM2 spells an emoji with several tokens."""
    lm = models.CausalLM.from_preset(smollm2)
    lm.compile(sampler="greedy")
    prompt = "🙂🙃🙂🙃🙂🙃🙂🙃"
    pieces = list(lm.stream(prompt, 24, None))
    assert "" in pieces, "some token should have been half a character"
    assert not any("\N{REPLACEMENT CHARACTER}" in x for x in pieces[:-1])
    assert "🙃" in "".join(pieces)
