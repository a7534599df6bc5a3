"""What upstream's users override or assign counts here, or is refused."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

BACKEND = keras.config.backend()
GPT2, LLAMA = FAMILIES[0], FAMILIES[3]
LENGTH = 12
PROMPTS = {
    "token_ids": random_tokens(2, LENGTH) * padding_mask([5, 3], LENGTH),
    "padding_mask": padding_mask([5, 3], LENGTH),
}
MASK = PROMPTS["padding_mask"].astype(bool)
ANSWER = 42


def tokens(lm, **kwargs):
    kwargs.setdefault("stop_token_ids", None)
    return np.array(lm.generate(dict(PROMPTS), **kwargs)["token_ids"])


def answers(token_ids):
    """Whether all that was generated is the answer."""
    return bool((token_ids[~MASK] == ANSWER).all())


def answering(inputs, outputs):
    mask = ops.cast(inputs["padding_mask"], "bool")
    token_ids = ops.where(mask, outputs["token_ids"], ANSWER)
    return {**outputs, "token_ids": token_ids}


class OwnStep:
    """A mixin that calls what it overrides."""

    def generate_step(self, inputs, stop_token_ids=None):
        outputs = super().generate_step(inputs, stop_token_ids)
        return answering(inputs, outputs)


def turned(cache):
    """A cache in which all that was read is something else."""
    return keras.tree.map_structure(lambda x: -3.0 * x, cache)


class OwnCache:
    def _build_cache(self, token_ids):
        x, cache = super()._build_cache(token_ids)
        return x, turned(cache)


class OwnCall:
    """Wants one token, and to have read others than it is given."""

    def call_with_cache(self, token_ids, cache, cache_update_index):
        logits, x, cache = super().call_with_cache(
            token_ids, cache, cache_update_index
        )
        return logits + 1e6 * ops.one_hot(ANSWER, logits.shape[-1]), x, cache


class OwnPrefill:
    """Shows in what is read of a prompt alone."""

    def call_with_cache(self, token_ids, cache, cache_update_index):
        logits, x, cache = super().call_with_cache(
            token_ids, cache, cache_update_index
        )
        return logits, x, turned(cache) if token_ids.shape[1] > 1 else cache


class OwnFunction:
    def make_generate_function(self):
        generate = super().make_generate_function()

        def function(inputs, stop_token_ids=None):
            outputs = generate(inputs, stop_token_ids=stop_token_ids)
            return answering(inputs, outputs)

        return function


def subclassed(family, *mixins, preprocessor=None, **kwargs):
    cls = family.ours("CausalLM")
    cls = type("Mine", (*mixins, cls), {})
    lm = cls(family.backbone(**kwargs), preprocessor)
    lm.compile(sampler="greedy")
    return lm


def test_a_generate_step():
    family = LLAMA
    plain = subclassed(family)
    assert not answers(tokens(plain))
    for lm in (
        subclassed(family, OwnStep),
        subclassed(family, type("Nothing", (), {}), OwnStep),
    ):
        assert answers(tokens(lm))
        # Of the third generation, which overrides nothing.
        cls = type("Another", (type(lm),), {})
        assert answers(tokens(cls(lm.backbone, None)))


@in_turn("mixin", [OwnCache, OwnPrefill, OwnCache])
def test_what_is_read_of_a_prompt(family, mixin):
    """Upstream's classes say what comes of it."""
    lm = subclassed(family, mixin)
    theirs = type("Theirs", (mixin, family.upstream("CausalLM")), {})(
        family.upstream_backbone(lm.backbone), None
    )
    theirs.compile(sampler="greedy")
    result = tokens(lm)
    assert (result != tokens(subclassed(family))).any()
    np.testing.assert_array_equal(result, tokens(theirs))


def test_a_cache_that_is_kept():
    """What a user built once is not written over by what follows it."""

    class Keeping:
        kept = None

        def _build_cache(self, token_ids):
            if self.kept is None:
                x, cache = super()._build_cache(token_ids)
                copies = keras.tree.map_structure(to_numpy, cache)
                type(self).kept = x, cache, copies
            return self.kept[:2]

    lm = subclassed(LLAMA, Keeping)
    lm.compile(sampler="greedy", run_eagerly=True)
    first = tokens(lm)
    np.testing.assert_array_equal(first, tokens(subclassed(LLAMA)))
    for after, before in zip(*map(keras.tree.flatten, lm.kept[1:])):
        np.testing.assert_array_equal(to_numpy(after), before)


@in_turn("sampler", ["greedy", "beam", "greedy"])
def test_a_call(family, sampler):
    lm = subclassed(family, OwnCall)
    lm.compile(sampler=sampler)
    assert answers(tokens(lm))


@pytest.mark.skipif(
    BACKEND != "torch", reason="elsewhere upstream traces what it calls"
)
def test_a_call_is_called_for_each_token_on_torch():
    lm = subclassed(LLAMA)
    call, seen = lm.call_with_cache, []

    def counted(token_ids, cache, cache_update_index):
        result = call(token_ids, cache, cache_update_index)
        seen.append(float(result[0].sum()))
        return result

    expected = tokens(lm)
    lm.call_with_cache = counted
    np.testing.assert_array_equal(tokens(lm), expected)
    # Prompts of each length for themselves, since the method knows of one index
    # for all: one prefill, then one call for each token.
    assert len(seen) == sum(1 + LENGTH - n for n in MASK.sum(axis=1))


def test_a_function_that_is_made():
    assert answers(tokens(subclassed(GPT2, OwnFunction)))


def assigned(lm):
    """Ways to assign what generates, after it has generated."""
    step = lm.generate_step

    def generate_step(inputs, stop_token_ids=None):
        return answering(inputs, step(inputs, stop_token_ids))

    def generate_function(inputs, stop_token_ids=None):
        return answering(inputs, inputs)

    def make_generate_function():
        return generate_function

    return {
        "generate_step": generate_step,
        "generate_function": generate_function,
        "make_generate_function": make_generate_function,
    }


@pytest.mark.parametrize(
    "name", ["generate_step", "generate_function", "make_generate_function"]
)
def test_what_is_assigned(name):
    lm = subclassed(LLAMA)
    before = tokens(lm)
    setattr(lm, name, assigned(lm)[name])
    assert answers(tokens(lm))
    with pytest.raises(ValueError, match=f"`{name}` of its own.*`generate"):
        tokens(lm, assistant_model=lm)
    if name == "generate_function":
        lm.generate_function = None
    else:
        delattr(lm, name)
    np.testing.assert_array_equal(tokens(lm), before)


def test_a_call_that_is_assigned():
    lm = subclassed(LLAMA)
    before = tokens(lm)
    call = type(lm).call_with_cache

    def answering_call(*args):
        logits, x, cache = call(lm, *args)
        return logits + 1e6 * ops.one_hot(ANSWER, logits.shape[-1]), x, cache

    lm.call_with_cache = answering_call
    assert answers(tokens(lm))
    del lm.call_with_cache
    np.testing.assert_array_equal(tokens(lm), before)


def test_a_class_that_is_patched(monkeypatch):
    lm = subclassed(LLAMA)
    tokens(lm)
    cls = LLAMA.ours("CausalLM")
    step = cls.generate_step

    def generate_step(self, inputs, stop_token_ids=None):
        return answering(inputs, step(self, inputs, stop_token_ids))

    monkeypatch.setattr(cls, "generate_step", generate_step)
    assert answers(tokens(lm))


def test_compiling_anew():
    """As upstream's users ask for it, after a change that nothing shows."""
    lm = subclassed(LLAMA)
    tokens(lm)
    loop = lm.generation_loop
    tokens(lm)
    assert lm.generation_loop is loop
    lm.generate_function = None
    assert lm.generation_loop is not loop


@pytest.mark.parametrize(
    "mixin, name",
    [
        (OwnStep, "generate_step"),
        (OwnCache, "_build_cache"),
        (OwnFunction, "make_generate_function"),
    ],
)
def test_what_runs_the_loops_refuses(mixin, name):
    preprocessor = GPT2.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    kwargs = dict(preprocessor=preprocessor, vocabulary_size=size)
    lm = subclassed(GPT2, mixin, **kwargs)
    plain = subclassed(GPT2, **kwargs)
    words = f"a Mine with a `{name}` of its own.*`generate"
    session = lm.start_session()
    for call in (
        lambda: lm.stream("the fox"),
        lambda: session.send("the fox", 3),
        lambda: list(session.stream_tokens([5, 6], 3)),
        lambda: lm.generate("the fox", assistant_model=plain),
        lambda: plain.generate("the fox", assistant_model=lm),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not len(session.token_ids)


def test_streams_and_drafts_call_what_a_class_calls():
    preprocessor = GPT2.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    global ANSWER
    kwargs = dict(preprocessor=preprocessor, vocabulary_size=size)
    lm, plain = (subclassed(GPT2, *x, **kwargs) for x in ([OwnCall], []))
    ANSWER = 5
    try:
        session = lm.start_session()
        assert list(session.stream_tokens([5, 6], 4)) == [5] * 4
        kwargs = dict(max_length=14, stop_token_ids=None)
        assert lm.generate(
            "the fox", assistant_model=plain, **kwargs
        ) == lm.generate("the fox", **kwargs)
    finally:
        ANSWER = 42


def texts(lm):
    preprocess = lm.preprocessor.generate_preprocess

    class Shouting(type(lm.preprocessor)):
        def generate_preprocess(self, x, sequence_length=None):
            return preprocess(["the"] * len(x), sequence_length=sequence_length)

        def generate_postprocess(self, x):
            return [y.upper() for y in super().generate_postprocess(x)]

    return Shouting(lm.preprocessor.tokenizer, sequence_length=16)


def test_a_preprocessor_that_is_replaced():
    lm = GPT2.text_lm()
    expected, other = lm.generate("the"), lm.generate("fox")
    lm.preprocessor = texts(lm)
    assert lm.generate("fox") == expected.upper() != other
    with pytest.raises(ValueError, match="`generate_postprocess` of its own"):
        lm.stream("fox", 4)


# === Samplers ===


class Answer(keras_hub.samplers.Sampler):
    """Says always the same, whatever the model does."""

    def __init__(self, token=ANSWER, forbidden=()):
        super().__init__()
        self.token, self.forbidden = token, list(forbidden)
        self.asked = keras.Variable(0, dtype="int32", trainable=False)

    def get_next_token(self, probabilities):
        token = self.token
        while token in self.forbidden:
            token += 1
        token = token + self.asked
        return ops.zeros(ops.shape(probabilities)[0], "int32") + token


class AnswerAtOnce(Answer):
    """The same, with a loop of its own."""

    def __call__(self, next, prompt, cache, index, mask, **kwargs):
        return ops.where(mask, prompt, ops.cast(self.token, prompt.dtype))


def test_a_sampler_that_is_replaced():
    """Also by one with a loop of its own, and back."""
    lm = subclassed(LLAMA)
    greedy = lm.sampler
    expected = tokens(lm)
    for sampler in (Answer(), AnswerAtOnce(), Answer(), AnswerAtOnce()):
        lm.sampler = sampler
        assert answers(tokens(lm))
    sampler.token = 8
    assert (tokens(lm)[~MASK] == 8).all()
    lm.sampler = greedy
    np.testing.assert_array_equal(tokens(lm), expected)
    lm.sampler = "greedy"
    with pytest.raises(ValueError, match="`sampler`.*'greedy'"):
        tokens(lm)


def test_attributes_of_a_sampler():
    """A number, what is in a list, and the value of a variable."""
    lm = subclassed(LLAMA)
    lm.sampler = Answer()
    assert answers(tokens(lm))
    lm.sampler.token = 7
    assert (tokens(lm)[~MASK] == 7).all()
    lm.sampler.forbidden.append(7)
    assert (tokens(lm)[~MASK] == 8).all()
    lm.sampler.asked.assign(3)
    assert (tokens(lm)[~MASK] == 11).all()
    lm.sampler = keras_hub.samplers.RandomSampler(temperature=1e-4, seed=1)
    cold = tokens(lm)
    np.testing.assert_array_equal(cold, tokens(lm))
    lm.sampler.temperature = 100.0
    assert (tokens(lm) != cold).any()


def test_a_sampler_that_is_replaced_with_an_assistant():
    lm = subclassed(LLAMA)
    tokens(lm, assistant_model=lm)
    lm.sampler = Answer()
    assert answers(tokens(lm, assistant_model=lm))
    lm.sampler.token = 7
    assert (tokens(lm, assistant_model=lm)[~MASK] == 7).all()


def test_a_sampler_that_is_replaced_in_the_middle():
    """Of a session, between its turns, and of what it says."""
    lm = GPT2.text_lm()
    session = lm.start_session()
    session.send("the fox", 2, None)
    lm.sampler = Answer(5)
    session.send("the fox", 2, None)
    assert list(session.token_ids[-2:]) == [5, 5]
    stream = session.stream_tokens([6], 6)
    said = []
    for token in (5, 7, 8, 7, 7, 9):
        lm.sampler.token = token
        said.append(next(stream))
    assert said == [5, 7, 8, 7, 7, 9]
    lm.compile(sampler="greedy")
    read = session.prefilled_tokens
    session.send("a", 3, None)
    text = session.token_ids
    assert session.prefilled_tokens <= read + 2
    again = lm.start_session()
    list(again.stream_tokens(text[:-3], 3))
    np.testing.assert_array_equal(again.token_ids, text)
