"""How prompts are read: empty ones, long ones, their length, where they stop.

Upstream cuts what is too long, goes on from padding where a prompt is empty,
and pays no attention to `max_length` without a preprocessor.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens

GPT2, LLAMA = FAMILIES[0], FAMILIES[3]
FOX = "the fox"
LONG = "the quick brown fox jumps over the lazy dog"
LENGTH = 12


def without_start(lm):
    """The same model with a tokenizer that has no start token."""
    lm.preprocessor.tokenizer.start_token_id = None
    lm.preprocessor.packer, lm.preprocessor.built = None, False
    return lm


def encoded(lm, text):
    x = lm.preprocessor.generate_preprocess([text], sequence_length=999)
    mask = ops.convert_to_numpy(x["padding_mask"]).astype(bool)
    return ops.convert_to_numpy(x["token_ids"])[mask].tolist()


def from_tokens(lm, token_ids, length=LENGTH, **kwargs):
    """What follows token ids without a preprocessor, as a list."""
    preprocessor, lm.preprocessor = lm.preprocessor, None
    inputs = {
        "token_ids": np.array([token_ids]),
        "padding_mask": np.ones((1, len(token_ids)), "int32"),
    }
    kwargs.setdefault("stop_token_ids", None)
    result = lm.generate(inputs, max_length=length, **kwargs)
    lm.preprocessor = preprocessor
    assert result["token_ids"].shape == (1, length)
    return np.array(result["token_ids"][0]).tolist()


def text_of(lm, token_ids):
    x = {
        "token_ids": np.array([token_ids]),
        "padding_mask": np.ones((1, len(token_ids)), "bool"),
    }
    return lm.preprocessor.generate_postprocess(x)[0]


# === Empty prompts ===


@deep_families
def test_an_empty_prompt_goes_on_from_the_start_token(family):
    lm = family.text_lm()
    start = [lm.preprocessor.tokenizer.start_token_id]
    assert encoded(lm, "") == start
    expected = from_tokens(lm, start)
    kwargs = dict(max_length=LENGTH, stop_token_ids=None)
    assert lm.generate("", **kwargs) == text_of(lm, expected)
    assert lm.generate(["", FOX], **kwargs) == [
        lm.generate("", **kwargs),
        lm.generate(FOX, **kwargs),
    ]
    assert lm.generate("", assistant_model=lm, **kwargs) == text_of(
        lm, expected
    )
    answer = "".join(lm.stream("", LENGTH - 1, None))
    session = lm.start_session()
    assert session.send("", LENGTH - 1, None) == answer
    assert session.token_ids.tolist() == expected
    session.send(FOX, 2, None)
    assert session.token_ids.tolist().count(start[0]) == (
        expected.count(start[0]) + session.token_ids[-2:].tolist().count(start)
    )


def test_sampling_without_a_prompt():
    """Rows of a batch are samples of their own."""
    lm = LLAMA.text_lm()
    keras.utils.set_random_seed(1)
    lm.compile(sampler="random")
    assert len(set(lm.generate([""] * 8, LENGTH, None))) > 1


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_nothing_at_all_is_refused(family):
    """All empty rows are named, and no others."""
    lm = without_start(family.text_lm())
    assert encoded(lm, "") == []
    words = "at least one token.*{}.*no start token"
    for prompts, rows in (
        ("", "none in prompt 0,"),
        ([FOX, ""], "none in prompt 1,"),
        (["", FOX, ""], "none in prompts 0, 2,"),
        (tf.constant(["", FOX, ""]), "none in prompts 0, 2,"),
        (np.array(["", FOX]), "none in prompt 0,"),
    ):
        with pytest.raises(ValueError, match=words.format(rows)):
            lm.generate(prompts)
    session = lm.start_session()
    for call in (lm.stream, session.send):
        with pytest.raises(ValueError, match="`text`.*no start token"):
            call("")
    session.send(FOX, 2, None)
    before = session.token_ids.tolist()
    assert before[:-2] == encoded(lm, FOX)
    # Nothing is taken away where nothing was added.
    session.send("the", 2, None)
    assert session.token_ids[len(before) : -2].tolist() == encoded(lm, "the")


def test_a_text_starts_once_whatever_the_preprocessor_says():
    """Upstream's add the start token, `add_start_token` or not."""
    lm = GPT2.text_lm()
    lm.preprocessor.add_start_token = False
    session = lm.start_session()
    for _ in range(2):
        session.send(FOX, 1, None)
        session.rewind(1)
    (start,) = encoded(lm, "")
    assert session.token_ids.tolist().count(start) == 1


# === Prompts that are too long ===


@deep_families
def test_what_is_cut(family):
    lm = family.text_lm()
    start, *ids = encoded(lm, LONG)
    room = 6
    for truncation, kept in (
        ("left", [start, *ids[1 - room :]]),
        ("right", [start, *ids[: room - 1]]),
    ):
        assert len(kept) == room
        kwargs = dict(stop_token_ids=None, truncation=truncation)
        # Rows that fit are what they are without others.
        result = lm.generate(["the", LONG, ""], max_length=room, **kwargs)
        assert result == [
            text_of(lm, from_tokens(lm, encoded(lm, "the"), room)),
            text_of(lm, kept),
            text_of(lm, from_tokens(lm, [start], room)),
        ]
        assert lm.generate(FOX, LENGTH, **kwargs) == lm.generate(
            FOX, LENGTH, None
        )
        for prompts in (tf.constant([LONG]), np.array([LONG])):
            result = lm.generate(prompts, max_length=room, **kwargs)
            assert result == [text_of(lm, kept)]
        batches = tf.data.Dataset.from_tensor_slices([LONG, LONG]).batch(1)
        result = lm.generate(batches, max_length=room, **kwargs)
        assert result == [text_of(lm, kept)] * 2
        # There may be room for the start token alone.
        kwargs["max_length"] = 1
        assert lm.generate(LONG, **kwargs) == text_of(lm, [start])


def test_the_text_is_upstreams_if_cut_on_the_right():
    lm = GPT2.text_lm()
    theirs = GPT2.upstream_task(
        GPT2.upstream_backbone(
            lm.backbone, vocabulary_size=lm.backbone.vocabulary_size
        ),
        GPT2.preprocessor(),
    )
    theirs.compile(sampler="greedy")
    prompts = [FOX, LONG]
    assert lm.generate(prompts, 8, truncation="right") == theirs.generate(
        prompts, 8
    )


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_what_is_cut_of_token_ids(truncation):
    lm = LLAMA.task(LLAMA.pair[0], None)
    lm.compile(sampler="greedy")
    tokens = random_tokens(2, 9)
    inputs = {"token_ids": tokens, "padding_mask": padding_mask([9, 4], 9)}
    kwargs = dict(stop_token_ids=None, truncation=truncation)
    result = lm.generate(inputs, max_length=6, **kwargs)["token_ids"]
    kept = tokens[0, -6:] if truncation == "left" else tokens[0, :6]
    np.testing.assert_array_equal(result[0], kept)
    expected = from_tokens(lm, tokens[1, :4].tolist(), 6)
    np.testing.assert_array_equal(result[1], expected)
    # What the user passed is what it was.
    np.testing.assert_array_equal(tokens, random_tokens(2, 9))


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_what_is_cut_of_a_session(truncation):
    """As much as the model has no positions for."""
    lm = GPT2.text_lm()
    limit, new = lm.backbone.max_positions, 4
    text = " ".join([LONG] * 4)
    start, *ids = encoded(lm, text)
    assert len(ids) > limit
    room = limit - new
    session = lm.start_session()
    answer = session.send(text, new, None, truncation)
    kept = ids[1 - room :] if truncation == "left" else ids[: room - 1]
    assert session.token_ids[:-new].tolist() == [start, *kept]
    expected = from_tokens(lm, [start, *kept], limit)
    assert session.token_ids.tolist() == expected
    assert "".join(lm.stream(text, new, None, truncation)) == answer
    # The next turn has no start token, and what is left of the room.
    session.rewind(20)
    before = len(session.token_ids)
    session.send(text, new, None, truncation=truncation)
    size = limit - new - before
    kept = ids[-size:] if truncation == "left" else ids[:size]
    assert session.token_ids[before:-new].tolist() == kept
    with pytest.raises(ValueError, match="64 positions"):
        session.send("a", new, None, truncation)


def test_all_that_is_too_long_is_named():
    lm = GPT2.text_lm()
    sizes = [len(encoded(lm, x)) for x in (LONG, FOX + " jumps")]
    words = (
        f"`max_length`=8 tokens. Received: prompts 1, 3 of {sizes[0]}, "
        f'{sizes[1]} tokens.*truncation="left"'
    )
    prompts = ["a", LONG, "", FOX + " jumps"]
    for x in (prompts, tf.constant(prompts), np.array(prompts)):
        with pytest.raises(ValueError, match=words):
            lm.generate(x, max_length=8)
    batches = tf.data.Dataset.from_tensor_slices(prompts).batch(2)
    with pytest.raises(ValueError, match="prompt 1 of"):
        lm.generate(batches, max_length=8)
    # Of what fills the length exactly, nothing is missing.
    assert lm.generate(LONG, max_length=sizes[0]) == LONG
    lm.preprocessor = None
    inputs = {
        "token_ids": random_tokens(3, 9) % 30,
        "padding_mask": padding_mask([9, 4, 7], 9),
    }
    with pytest.raises(ValueError, match="prompts 0, 2 of 9, 7 tokens"):
        lm.generate(inputs, max_length=5, stop_token_ids=None)


def test_characters_that_are_normalized_to_many():
    """A letter of three bytes is 18 letters for SentencePiece."""
    lm = LLAMA.text_lm()
    text = "\ufdfa" * 3
    count = len(encoded(lm, text))
    assert count > len(text.encode()) + 3
    with pytest.raises(ValueError, match=f"prompt 0 of {count} tokens"):
        lm.generate(text, max_length=count - 1)
    session = lm.start_session()
    session.send(text, 1, None)
    assert session.token_ids[:-1].tolist() == encoded(lm, text)


# === The length of token ids ===


@deep_families
@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_max_length_without_a_preprocessor(family, sampler):
    lm = family.task(family.pair[0], None)
    lm.compile(sampler=sampler)
    tokens, lengths = random_tokens(2, 5), [5, 3]

    def prompts(length):
        mask = padding_mask(lengths, length)
        padded = np.pad(tokens, ((0, 0), (0, length - 5))) * mask
        return {"token_ids": padded, "padding_mask": mask}

    kwargs = dict(stop_token_ids=None)
    expected = lm.generate(prompts(LENGTH), **kwargs)
    # From none, some and more room than that.
    for inputs in map(prompts, (5, 8, LENGTH, 20)):
        result = lm.generate(inputs, max_length=LENGTH, **kwargs)
        for name, x in expected.items():
            np.testing.assert_array_equal(result[name], x)
    tensors = {k: ops.convert_to_tensor(x) for k, x in prompts(5).items()}
    batches = tf.data.Dataset.from_tensor_slices(prompts(5)).batch(2)
    for inputs in (tensors, batches):
        result = lm.generate(inputs, max_length=LENGTH, **kwargs)
        np.testing.assert_array_equal(
            result["token_ids"], expected["token_ids"]
        )
    stripped = lm.generate(prompts(LENGTH), strip_prompt=True, **kwargs)
    result = lm.generate(
        prompts(5), max_length=LENGTH, strip_prompt=True, **kwargs
    )
    for name, x in stripped.items():
        np.testing.assert_array_equal(result[name], x)


# === Where to stop ===


def kinds_of_collections(tokens):
    yield set(tokens)
    yield frozenset(tokens)
    yield dict.fromkeys(tokens).keys()
    yield np.array(tokens)
    yield [np.int64(x) for x in tokens]
    yield ops.convert_to_tensor(tokens)
    yield [*ops.convert_to_tensor(tokens)]
    yield tf.constant(tokens)
    yield (x for x in tokens)
    yield iter(tokens)


def kind_of_collection(tokens, i):
    return list(kinds_of_collections(tokens))[i]


@on_one_backend("what tokens a collection has is looked at")
def test_what_to_stop_at_is_any_collection():
    lm = GPT2.text_lm()
    lm.compile(sampler="greedy", run_eagerly=True)
    text = lm.preprocessor.tokenizer.detokenize
    stops = [3, int(from_tokens(lm, encoded(lm, FOX))[-1])]
    kwargs = dict(max_length=LENGTH, strip_prompt=True)
    expected = lm.generate(FOX, stop_token_ids=stops, **kwargs)
    assert expected != lm.generate(FOX, stop_token_ids=None, **kwargs)
    streamed = list(lm.stream(FOX, 5, stops))
    session = lm.start_session()
    session.send(FOX, 5, stops)
    said = session.token_ids.tolist()
    assert said[-1] in stops and text(said[-1:])
    for i in range(len(list(kinds_of_collections(stops)))):
        # Made anew each time: an iterator is used up.
        given = functools.partial(kind_of_collection, stops, i)
        for assistant in (None, lm):
            options = dict(kwargs, assistant_model=assistant)
            result = lm.generate(FOX, stop_token_ids=given(), **options)
            assert result == expected
        assert list(lm.stream(FOX, 5, given())) == streamed
        for call, prompt in (
            ("send", FOX),
            ("stream_tokens", encoded(lm, FOX)),
        ):
            session = lm.start_session()
            list(getattr(session, call)(prompt, 5, given()))
            assert session.token_ids.tolist() == said
