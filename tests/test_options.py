"""What options do to logits is what transformers and OpenAI's API say."""

import dataclasses
import functools
import math

import keras
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops
from transformers.generation import logits_process

from keras_nlp_cache.generate.options.logprobs import top_logprobs
from keras_nlp_cache.generate.options.options import Options
from keras_nlp_cache.generate.options.processing import process
from keras_nlp_cache.generate.options.structure import Structure
from tests.families import examples
from tests.families import FAMILIES
from tests.families import on_one_backend
from tests.families import to_numpy

# Of one size, for the sake of JAX, and few tokens, for them to come again.
ROWS, SLOTS, VOCABULARY = 3, 8, 6
INF = math.inf


@dataclasses.dataclass
class Step:
    """What a step of decoding knows. Rows have texts of their own lengths."""

    logits: np.ndarray
    token_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    temperature: float = 1.0

    def arrays(self):
        temperature = np.float32(self.temperature)
        return [*list(vars(self).values())[:-1], temperature]

    def row(self, i):
        one = slice(i, i + 1)
        return Step(*(x[one] for x in self.arrays()[:-1]), self.temperature)


def step(seed=0, temperature=1.0, scale=4.0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, SLOTS + 1, ROWS)
    return Step(
        (scale * rng.normal(size=(ROWS, VOCABULARY))).astype("float32"),
        # With what is no text after the texts.
        rng.integers(VOCABULARY, size=(ROWS, SLOTS)).astype("int32"),
        lengths.astype("int32"),
        rng.integers(1, lengths + 1).astype("int32"),
        temperature,
    )


def processed(options, step):
    """The logits that options make of a step, as an array."""
    values = options.values(step.logits.shape[1])
    tensors = map(ops.convert_to_tensor, step.arrays()[:-1])
    result = process(options.structure, values, *tensors, step.temperature)
    assert keras.backend.standardize_dtype(result.dtype) == "float32"
    return to_numpy(result)


def transformed(options, step):
    """What transformers' processors make of it, each row alone.

    With OpenAI's formula in between, and without `logits_processor`, which
    they do not have.
    """
    rows = []
    for i, length in enumerate(step.lengths):
        text = torch.tensor(step.token_ids[i : i + 1, :length]).long()
        x = torch.tensor(step.logits[i : i + 1])
        if options.logit_bias:
            biases = {(k,): v for k, v in options.logit_bias.items()}
            x = logits_process.SequenceBiasLogitsProcessor(biases)(text, x)
        x = logits_process.RepetitionPenaltyLogitsProcessor(
            options.repetition_penalty
        )(text, x)
        generated = step.token_ids[i, step.prompt_lengths[i] : length]
        times = np.bincount(generated, minlength=VOCABULARY)
        x = x - torch.tensor(
            options.frequency_penalty * times
            + options.presence_penalty * (times > 0)
        )
        if options.bad_words:
            words = [list(x) for x in options.bad_words]
            x = logits_process.NoBadWordsLogitsProcessor(words)(text, x)
        y = x / step.temperature
        y = logits_process.MinPLogitsWarper(options.min_p)(text, y)
        rows.append((x.numpy(), y.numpy() * step.temperature))
    before, after = (np.concatenate(x) for x in zip(*rows))
    if options.min_p:
        # Which of two that are as likely is less likely, rounding says. The
        # likeliest ones stay.
        best = before.max(axis=1, keepdims=True)
        least = best + step.temperature * math.log(options.min_p)
        rounded = (abs(before - least) < 1e-4) & (before < best)
        after = np.where(rounded, np.nan, after)
    return after.astype("float32")


def assert_transformed(options, step):
    expected = transformed(options, step)
    actual = np.where(np.isnan(expected), np.nan, processed(options, step))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


WORDS = [[0], [1, 2], [3, 3], [5, 4, 3], [2, 2, 2, 1]]
OPTIONS = {
    "logit_bias": [{0: 3.5, 4: -2.0}, {3: -INF}],
    "repetition_penalty": [1.3, 0.7],
    "presence_penalty": [0.8, -0.8],
    "frequency_penalty": [0.5, -0.5],
    "bad_words": [WORDS, [[x, x] for x in range(VOCABULARY)]],
    "min_p": [0.05, 0.3, 1.0],
}
ALL = {name: values[0] for name, values in OPTIONS.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_alone(name):
    changed = 0
    for value in OPTIONS[name]:
        for seed in range(6):
            x = step(seed, temperature=0.7)
            options = Options(**{name: value})
            assert_transformed(options, x)
            changed += (processed(options, x) != x.logits).any(axis=1).sum()
    assert changed > 4, "most examples should have been of no consequence"


def test_texts_that_are_shorter_than_a_word():
    x = step()
    x.token_ids[:] = 2
    x.lengths = np.array([1, 2, 3], "int32")
    x.prompt_lengths = np.array([1, 1, 1], "int32")
    options = Options(bad_words=[[2, 2, 1], [2, 2, 2, 0]])
    assert_transformed(options, x)
    left_out = processed(options, x) == -INF
    assert left_out.sum(axis=1).tolist() == [0, 1, 2]


TOKENS = st.integers(0, VOCABULARY - 1)
PENALTIES = st.floats(-2, 2, width=32)


@settings(deadline=None, max_examples=examples(200))
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(0.125, 4, width=32),
            "presence_penalty": PENALTIES,
            "frequency_penalty": PENALTIES,
            "min_p": st.floats(0, 1, width=32),
            "logit_bias": st.dictionaries(TOKENS, PENALTIES),
            "bad_words": st.lists(
                st.lists(TOKENS, min_size=1, max_size=4), max_size=5
            ),
        },
    ),
    st.integers(0, 1000),
    st.floats(0.25, 4, width=32),
)
def test_together(chosen, seed, temperature):
    assert_transformed(Options(**chosen), step(seed, temperature))


def shortened(token_ids, logits, lengths):
    """Makes of logits something of all that a function is told."""
    total = ops.cast(ops.sum(token_ids, axis=1) + lengths, "float32")
    return logits * total[:, None]


EVERYTHING = {**ALL, "logits_processor": shortened}


@pytest.mark.parametrize("names", [*EVERYTHING, "all"])
def test_rows_do_not_depend_on_each_other(names):
    chosen = EVERYTHING if names == "all" else {names: EVERYTHING[names]}
    options, x = Options(**chosen), step(3)
    together = processed(options, x)
    alone = [processed(options, x.row(i))[0] for i in range(ROWS)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    # What comes after a text is none of it.
    after = np.arange(SLOTS) >= x.lengths[:, None]
    assert after.any()
    x.token_ids = np.where(after, 5 - x.token_ids, x.token_ids)
    np.testing.assert_array_equal(processed(options, x), together)


def test_what_a_function_is_told():
    x, told = step(1), []

    def function(token_ids, logits, lengths):
        told.extend([token_ids, logits, lengths])
        return logits

    for dtype in ("float32", "float16"):
        half = dataclasses.replace(x, logits=x.logits.astype(dtype))
        processed(Options(logits_processor=function, logit_bias={1: 9}), half)
    assert all(map(ops.is_tensor, told)) and len(told) == 6
    dtypes = [keras.backend.standardize_dtype(y.dtype) for y in told]
    assert dtypes == 2 * ["int32", "float32", "int32"]
    token_ids, logits, lengths = map(ops.convert_to_numpy, told[:3])
    text = np.arange(SLOTS) < x.lengths[:, None]
    np.testing.assert_array_equal(token_ids, np.where(text, x.token_ids, 0))
    np.testing.assert_array_equal(lengths, x.lengths)
    # After the other options.
    np.testing.assert_allclose(logits[:, 1], x.logits[:, 1] + 9, rtol=1e-6)


def test_a_function_comes_before_min_p():
    def function(token_ids, logits, lengths):
        return ops.concatenate([logits[:, :1] + 100, logits[:, 1:]], axis=1)

    x = processed(Options(logits_processor=function, min_p=0.5), step())
    assert np.isfinite(x[:, 0]).all() and (x[:, 1:] == -INF).all()


@pytest.mark.parametrize("wrong", ["nothing", "one row", "words"])
def test_a_function_that_returns_no_logits(wrong):
    def function(token_ids, logits, lengths):
        return {"nothing": None, "one row": logits[0], "words": "a"}[wrong]

    with pytest.raises(
        ValueError, match=r"`logits_processor` to return logits.*\(3, 6\)"
    ):
        processed(Options(logits_processor=function), step())


NEUTRAL = {
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "min_p": 0,
    "logit_bias": {},
    "bad_words": [],
    "stop_strings": [],
}


def test_what_is_off_costs_nothing():
    logits = ops.convert_to_tensor(step().logits)
    for chosen in (
        {},
        NEUTRAL,
        dict.fromkeys(NEUTRAL),
        dict(return_logprobs=3, stop_strings="a"),
    ):
        options = Options(**chosen)
        assert options.values(VOCABULARY) == {}
        assert process(options.structure, {}, logits, *4 * [None]) is logits


def compiled(function, *arguments):
    """A compiled function of arrays, and a list of as many as its traces."""
    traces = []

    def traced(*args):
        traces.append(None)
        return function(*args)

    def tensors(args):
        return keras.tree.map_structure(ops.convert_to_tensor, args)

    if keras.config.backend() == "jax":
        import jax

        call = jax.jit(traced)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(traced, jit_compile=True, autograph=False)
    else:
        from torch.utils import _pytree as pytree

        from keras_nlp_cache.generate.loops.torch_capture import capture

        module = capture(traced, *tensors(arguments))
        for x in module.graph.nodes:
            if isinstance(x.target, torch._ops.OpOverload):
                assert not x.target._schema.is_mutable
        # Nothing as large as the logits is kept.
        assert all(x.numel() <= SLOTS for x in module.buffers())

        def call(*args):
            return module(*pytree.tree_leaves(args))

    return lambda *args: call(*tensors(args)), traces


def in_a_row(token_ids, logits, lengths):
    """Forbids the last token of a text, with operations of the backend."""
    last = ops.take_along_axis(token_ids, lengths[:, None] - 1, axis=1)
    is_last = ops.arange(VOCABULARY, dtype="int32")[None] == last
    return ops.where(is_last, -1e9, logits)


@pytest.mark.parametrize("names", ["all but a function", "all"])
def test_compiled(names):
    function = {"logits_processor": in_a_row} if names == "all" else {}
    first = Options(**ALL, **function)
    run, traces = compiled(
        functools.partial(process, first.structure),
        first.values(VOCABULARY),
        *step().arrays(),
    )
    others = {name: values[-1] for name, values in OPTIONS.items()}
    others["min_p"] = 0.2
    for options in (first, Options(**others, **function)):
        assert options.structure == first.structure
        for seed in range(3):
            x = step(seed, temperature=0.5 + seed)
            np.testing.assert_allclose(
                to_numpy(run(options.values(VOCABULARY), *x.arrays())),
                processed(options, x),
                rtol=1e-5,
                atol=1e-5,
            )
    assert len(traces) == 1


class Bound:
    # Neither is needed, and this would be equal to any other.
    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Bound)

    def __call__(self, token_ids, logits, lengths):
        return logits

    def method(self, token_ids, logits, lengths):
        return logits


@on_one_backend("what is compiled again for is decided")
def test_what_is_compiled_again_for():
    def structure(**chosen):
        return Options(**chosen).structure

    one, other = Bound(), Bound()
    same = [
        (dict(repetition_penalty=1.2), dict(repetition_penalty=1.5)),
        (dict(presence_penalty=1), dict(frequency_penalty=-2)),
        (dict(min_p=0.1), dict(min_p=1)),
        (dict(logit_bias={1: 1}), dict(logit_bias={2: 3, 4: 5})),
        (dict(bad_words=[[1]]), dict(bad_words=[[1, 2, 3, 4]] + [[5]] * 7)),
        (dict(stop_strings="a"), dict(stop_strings=["b", "c"])),
        (dict(logits_processor=one), dict(logits_processor=one)),
        (dict(logits_processor=one.method), dict(logits_processor=one.method)),
    ]
    different = [
        {},
        dict(repetition_penalty=1.2),
        dict(presence_penalty=1),
        dict(min_p=0.1),
        dict(logit_bias={1: 1}),
        dict(bad_words=[[1]]),
        dict(bad_words=[[1] * 5]),
        dict(bad_words=[[x] for x in range(9)]),
        dict(logits_processor=one),
        dict(logits_processor=other),
        dict(logits_processor=one.method),
        dict(logits_processor=other.method),
        dict(return_logprobs=0),
        dict(return_logprobs=1),
    ]
    for x, y in same:
        assert structure(**x) == structure(**y)
        assert hash(structure(**x)) == hash(structure(**y))
    structures = {structure(**x) for x in different}
    assert len(structures) == len(different)
    assert Structure() in structures


@on_one_backend("arrays of bad words are made")
def test_sizes_of_bad_words():
    for count, size in ((1, 8), (8, 8), (9, 16), (17, 32)):
        for length, slots in ((1, 4), (4, 4), (5, 8)):
            words = [[i] + [0] * (length - 1) for i in range(count)]
            values = Options(bad_words=words).values(99)
            assert values["bad_words"].shape == (size, slots)
            lengths = values["bad_word_lengths"]
            assert lengths.tolist() == count * [length] + (size - count) * [0]


@functools.cache
def tokenizer(name):
    return next(x for x in FAMILIES if x.name == name).preprocessor().tokenizer


@on_one_backend("words are spelled")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_words_are_spelled_with_a_space_and_without(family):
    """Neither of the two can be completed, and the rest goes on."""
    speller = tokenizer(family)
    options = Options(bad_words=["the", [3, 4], "fox"]).tokenized(speller)
    spelled = {
        tuple(np.asarray(speller.tokenize(x)).tolist())
        for x in ("the", " the", "fox", " fox")
    }
    assert set(options.bad_words) == spelled | {(3, 4)}
    assert len(options.bad_words) == len(set(options.bad_words))
    size = speller.vocabulary_size()
    for word in options.bad_words:
        text = [7, *word[:-1]]
        x = Step(
            np.zeros((1, size), "float32"),
            np.array([text]),
            np.array([len(text)]),
            np.array([1]),
        )
        left_out = np.flatnonzero(processed(options, x)[0] == -INF)
        assert word[-1] in left_out and len(left_out) <= len(spelled) + 1


@pytest.mark.parametrize("k", [0, 1, 4])
def test_log_probabilities(k):
    x = step(2)
    chosen = np.array([5, 0, 3])
    for dtype in ("float32", "float16"):
        logits = x.logits.astype(dtype)
        logprob, ids, logprobs = map(
            ops.convert_to_numpy,
            top_logprobs(ops.convert_to_tensor(logits), chosen, k),
        )
        expected = torch.log_softmax(torch.tensor(logits).float(), 1).numpy()
        best = np.argsort(-expected, axis=1)[:, :k]
        assert logprob.shape == (ROWS,) and logprob.dtype == "float32"
        assert ids.shape == logprobs.shape == (ROWS, k)
        assert ids.dtype == "int32" and logprobs.dtype == "float32"
        np.testing.assert_allclose(
            logprob, expected[np.arange(ROWS), chosen], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(ids, best)
        np.testing.assert_allclose(
            logprobs,
            np.take_along_axis(expected, best, axis=1),
            rtol=1e-5,
            atol=1e-6,
        )


def test_log_probabilities_compiled():
    logits, chosen = step(2).logits, np.array([5, 0, 3])
    run, _ = compiled(lambda *x: top_logprobs(*x, 2), logits, chosen)
    expected = top_logprobs(ops.convert_to_tensor(logits), chosen, 2)
    for x, y in zip(run(logits, chosen), expected, strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=1e-5)


POSITIVE = "`repetition_penalty`.*finite number above 0.*Received: "
FINITE = "`{}` to be a finite number. Received: "
SHARE = "`min_p`.*number from 0 to 1.*Received: "
BIAS = "`logit_bias`.*dictionary from token ids.*Received: "
WORD = "each of `bad_words`.*"
COUNT = "`return_logprobs`.*integer of 0 or more.*Received: "

# Name, value, words of the message.
WRONG = [
    ("repetition_penalty", 0, POSITIVE + "0.*Pass 1"),
    ("repetition_penalty", -1.5, POSITIVE + "-1.5"),
    ("repetition_penalty", INF, POSITIVE + "inf"),
    ("repetition_penalty", math.nan, POSITIVE + "nan"),
    ("repetition_penalty", 1e300, POSITIVE + "1e\\+300"),
    ("repetition_penalty", 1e-300, POSITIVE + "1e-300"),
    ("repetition_penalty", 10**400, POSITIVE + "1000"),
    ("repetition_penalty", "1.2", POSITIVE + "'1.2'"),
    ("repetition_penalty", True, POSITIVE + "True"),
    ("repetition_penalty", [1.2], POSITIVE + r"\[1.2\]"),
    ("presence_penalty", INF, FINITE.format("presence_penalty") + "inf"),
    ("presence_penalty", "high", FINITE.format("presence_penalty") + "'high'"),
    ("frequency_penalty", math.nan, FINITE.format("frequency_penalty") + "nan"),
    ("frequency_penalty", 1j, FINITE.format("frequency_penalty") + "1j"),
    ("min_p", -0.1, SHARE + "-0.1"),
    ("min_p", 1.5, SHARE + "1.5"),
    ("min_p", math.nan, SHARE + "nan"),
    ("min_p", "0.1", SHARE + "'0.1'"),
    ("min_p", False, SHARE + "False"),
    ("logit_bias", [1, 2], BIAS + r"\[1, 2\]"),
    ("logit_bias", {"a": 1}, BIAS + "'a': 1"),
    ("logit_bias", {1.0: 1}, BIAS + "1.0: 1"),
    ("logit_bias", {1: "a"}, BIAS + "1: 'a'"),
    ("logit_bias", {1: INF}, BIAS + "1: inf"),
    ("logit_bias", {1: math.nan}, BIAS + "1: nan"),
    ("bad_words", "bad", "`bad_words`.*sequence.*'bad'.*in a list"),
    ("bad_words", 3, "`bad_words`.*sequence.*3"),
    ("bad_words", {"a": 1}, "`bad_words`.*sequence.*'a'"),
    ("bad_words", [3], WORD + "string or a list of token ids.*3"),
    ("bad_words", [[1.5]], WORD + r"\[1.5\]"),
    ("bad_words", [[True]], WORD + r"\[True\]"),
    ("bad_words", [["a"]], WORD + r"\['a'\]"),
    ("bad_words", [b"a"], WORD + "b'a'"),
    ("bad_words", [[]], WORD + r"a token at least.*\(\).*Leave it out"),
    ("bad_words", ["the", ""], WORD + "a token at least.*''.*Leave it out"),
    ("logits_processor", 3, "`logits_processor`.*function.*Received: 3"),
    ("stop_strings", 3, "`stop_strings`.*string or a sequence.*3"),
    ("stop_strings", [3], r"`stop_strings`.*sequence of strings.*\[3\]"),
    ("stop_strings", b"a", "`stop_strings`.*sequence of strings.*b'a'"),
    ("stop_strings", "", "`stop_strings`.*no empty string.*Leave it out"),
    ("stop_strings", ["a", ""], "`stop_strings`.*no empty string"),
    ("return_logprobs", -1, COUNT + "-1"),
    ("return_logprobs", 1.0, COUNT + "1.0"),
    ("return_logprobs", True, COUNT + "True"),
]


@on_one_backend("options are checked")
@pytest.mark.parametrize("name, value, words", WRONG)
def test_mistakes(name, value, words):
    with pytest.raises(ValueError, match=f"(?s)^Expected .*{words}"):
        Options(**{name: value})


@on_one_backend("options are checked")
@pytest.mark.parametrize("method", ["generate", "stream", "generate_many"])
def test_an_option_that_there_is_not(method):
    call = getattr(FAMILIES[0].text_lm(), method)
    words = "^Expected .*`bad_words`, .*Received: `max_tokens`, `top_k`"
    with pytest.raises(TypeError, match=words):
        list(
            call("the fox", max_new_tokens=4, max_tokens=3, top_k=5, min_p=0.5)
        )


NOT_FOR_THIS_MODEL = [
    (dict(logit_bias={5: 1, 6: 1, -1: 1}), r"`logit_bias`.*to 5,.*\[-1, 6\]"),
    (dict(bad_words=[[0, 6]]), r"`bad_words`.*from 0 to 5,.*\[6\]"),
    (dict(bad_words=[[-2]]), r"`bad_words`.*from 0 to 5,.*\[-2\]"),
    (dict(bad_words=["the"]), r"`Options.tokenized\(\)`.*\['the'\]"),
    (
        dict(bad_words=[[0], [1], [2]], logit_bias={3: -INF, 4: -INF, 5: -INF}),
        "leave a token to pick.*all 6 tokens",
    ),
    (dict(return_logprobs=7), "`return_logprobs`.*at most 6.*7"),
]


@on_one_backend("options are checked")
@pytest.mark.parametrize("chosen, words", NOT_FOR_THIS_MODEL)
def test_not_for_this_model(chosen, words):
    options = Options(**chosen)
    with pytest.raises(ValueError, match=f"(?s)^Expected .*{words}"):
        options.values(VOCABULARY)


@on_one_backend("words are spelled")
def test_words_that_cannot_be_spelled():
    options = Options(bad_words=[[1], "the"])
    with pytest.raises(ValueError, match="no `preprocessor`.*'the'"):
        options.tokenized(None)
    assert Options(bad_words=[[1]]).tokenized(None).bad_words == ((1,),)
    with pytest.raises(ValueError, match="a token at least.*' '.*makes none"):
        Options(bad_words=[" "]).tokenized(tokenizer("llama"))


def test_numbers_and_collections_of_all_kinds():
    array = ops.convert_to_tensor(np.array([[1, 2], [3, 4]]))
    x = Options(
        repetition_penalty=np.float32(1.5),
        presence_penalty=np.int64(1),
        logit_bias={np.int32(1): np.float64(2)},
        bad_words=array,
        stop_strings={"a"},
        return_logprobs=np.int64(2),
    )
    y = Options(
        repetition_penalty=1.5,
        presence_penalty=1,
        logit_bias={1: 2},
        bad_words=[(1, 2), np.array([3, 4])],
        stop_strings="a",
        return_logprobs=2,
    )
    assert dataclasses.asdict(x) == dataclasses.asdict(y)
