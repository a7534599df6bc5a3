"""Bad calls of models and tasks say what is wrong, and change nothing.

Calls of backbones are in `test_bad_input.py`, edits in
`test_surgery_bad_input.py`, exported steps in `test_step_model.py`.
"""

import functools
import shutil

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache.command_line.cli import main
from tests import test_bad_input
from tests import test_command_line
from tests.families import divided
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

GPT2, LLAMA = FAMILIES[0], FAMILIES[3]
TOKENS = random_tokens(1, 8)
MASK = padding_mask([4], 8)
CONFIG = dict(GPT2.config)


@functools.cache
def text_model():
    return GPT2.text_lm()


@functools.cache
def model_without_start():
    """A text model whose tokenizer has no start token."""
    lm = GPT2.text_lm()
    lm.preprocessor.tokenizer.start_token_id = None
    return lm


@functools.cache
def token_model():
    lm = GPT2.task(GPT2.backbone(), None)
    lm.compile(sampler="greedy")
    return lm


def constructor(cls, *args, **kwargs):
    return lambda folder: getattr(models, cls)(*args, **kwargs)


def text(inputs="the fox", **kwargs):
    return lambda folder: text_model().generate(inputs, **kwargs)


def tokens(stop_token_ids=None, max_length=None, **changes):
    inputs = {"token_ids": TOKENS, "padding_mask": MASK, **changes}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    return lambda folder: token_model().generate(
        inputs, stop_token_ids=stop_token_ids, max_length=max_length
    )


def score(token_ids=TOKENS, **kwargs):
    return lambda folder: token_model().score(token_ids, **kwargs)


def stream(*args, **kwargs):
    return lambda folder: list(text_model().stream(*args, **kwargs))


def session(name, *args, **kwargs):
    def call(folder):
        session = text_model().start_session()
        session.send("the", 2, None)
        args_ = [
            x.format(folder=folder) if isinstance(x, str) else x for x in args
        ]
        result = getattr(session, name)(*args_, **kwargs)
        if name == "stream_tokens":
            next(result)

    return call


def of_another_family(folder):
    cls = type("Mine", (models.GPT2CausalLM,), {})
    return cls.from_preset(str(folder / "llama"))


def start(path):
    return lambda folder: text_model().start_session(path.format(folder=folder))


def load(function, path):
    return lambda folder: function(path.format(folder=folder))


def other_session(folder):
    """The file of a session of another model."""
    other = GPT2.task(
        GPT2.backbone(
            vocabulary_size=text_model().backbone.vocabulary_size,
            hidden_dim=16,
        ),
        GPT2.preprocessor(),
    )
    path = f"{folder}/other.safetensors"
    if not list(folder.glob("other*")):
        other.start_session().save(path)
    return text_model().start_session(path)


MAX_LENGTH = "`max_length`.*integer of 1 or more.*"
DICTIONARY = "dictionary of integer `token_ids` and `padding_mask`.*"
STOPS = "`stop_token_ids`.*sequence of integers.*"
NEW = "`max_new_tokens`.*1 or more.*"

CALLS = {
    "a task of nothing": (
        constructor("GPT2CausalLM", None, None),
        "`backbone`.*keras_nlp_cache.models.*NoneType",
    ),
    "a task of a word": (
        constructor("GPT2CausalLM", "gpt2", None),
        "`backbone`.*builtins.str",
    ),
    "a task of another layer": (
        constructor("LlamaCausalLM", keras.layers.Dense(3), None),
        "`backbone`.*Dense",
    ),
    "no blocks": (
        constructor("GPT2Backbone", **{**CONFIG, "num_layers": 0}),
        "at least one decoder block.*GPT2Backbone",
    ),
    "an unknown dtype": (
        constructor("GPT2Backbone", **CONFIG, dtype="floaty"),
        "floaty",
    ),
    "an unknown sampler": (
        lambda folder: text_model().compile(sampler="nope"),
        "`sampler`.*top_k.*'nope'",
    ),
    "a cache of integers": (
        lambda folder: text_model().compile(cache_dtype="int8"),
        "`cache_dtype`.*floating.*int8",
    ),
    "a cache of an unknown dtype": (
        lambda folder: text_model().compile(cache_dtype="floaty"),
        "floaty",
    ),
    "to generate from nothing": (text(None), "string.*None"),
    "to generate from a number": (text(5), "string.*5"),
    "to generate from bytes": (text(b"the"), "string.*b'the'"),
    "to generate from numbers": (text([1, 2]), r"strings.*\[1, 2\]"),
    "to generate from a mixture": (text(["a", 3]), r"strings.*\['a', 3\]"),
    "to generate from lists": (text([["the"]]), r"strings.*\[\['the'\]\]"),
    "to generate from no prompts": (text([]), r"at least one prompt.*\[\]"),
    "to generate from nothing, without a start token": (
        lambda folder: model_without_start().generate(["", "a", ""]),
        "at least one token.*none in prompts 0, 2.*no start token",
    ),
    "no length": (text(max_length=0), MAX_LENGTH + "0"),
    "a negative length": (text(max_length=-1), MAX_LENGTH + "-1"),
    "a length in words": (text(max_length="8"), MAX_LENGTH + "'8'"),
    "a fractional length": (text(max_length=8.5), MAX_LENGTH + "8.5"),
    "a boolean length": (text(max_length=True), MAX_LENGTH + "True"),
    "more than the positions": (
        text(max_length=65),
        "`max_length`.*64 positions.*65",
    ),
    "prompts that are too long": (
        text(["the quick brown fox", "a", "lazy dog"], max_length=3),
        "at most `max_length`=3 tokens.*prompts 0, 2 of [0-9]+, [0-9]+ tokens"
        ".*truncation=",
    ),
    "token ids that are too long": (
        tokens(max_length=3),
        "at most `max_length`=3 tokens.*prompt 0 of 4 tokens.*truncation=",
    ),
    "more token ids than positions": (
        tokens(max_length=65),
        "`max_length`.*64 positions.*65",
    ),
    "to cut in the middle": (
        text(truncation="middle"),
        "`truncation`.*'error', 'left', 'right'.*'middle'",
    ),
    "to cut or not": (text(truncation=True), "`truncation`.*True"),
    "to stop at a word": (text(stop_token_ids="never"), STOPS + "'never'"),
    "to stop at a number": (text(stop_token_ids=5), STOPS + "5"),
    "to stop at half a token": (text(stop_token_ids=[1.5]), STOPS + "1.5"),
    "to stop at words": (text(stop_token_ids=["a"]), STOPS + "'a'"),
    "to stop at what nobody knows": (
        tokens(stop_token_ids="auto"),
        "`preprocessor`.*stop_token_ids",
    ),
    "text without a preprocessor": (
        lambda folder: token_model().generate("the", stop_token_ids=None),
        DICTIONARY + "'the'.*set `preprocessor`",
    ),
    "a list without a preprocessor": (
        lambda folder: token_model().generate([1, 2], stop_token_ids=None),
        DICTIONARY + r"\[1, 2\]",
    ),
    "no mask": (tokens(padding_mask=None), DICTIONARY + r"\['token_ids'\]"),
    "no tokens": (tokens(token_ids=None), DICTIONARY + r"\['padding_mask'\]"),
    "a mask of another shape": (
        tokens(padding_mask=MASK[:, :5]),
        DICTIONARY + r"\(1, 8\) and \(1, 5\)",
    ),
    "no batch": (
        tokens(token_ids=TOKENS[0], padding_mask=MASK[0]),
        DICTIONARY + r"\(8,\) and \(8,\)",
    ),
    "fractional tokens": (
        tokens(token_ids=TOKENS * 1.5),
        DICTIONARY + "float64",
    ),
    "tokens of another vocabulary": (
        tokens(token_ids=TOKENS + 1000),
        "from 0 to 99.*ids from 10",
    ),
    "negative tokens": (
        tokens(token_ids=TOKENS - 1000),
        "from 0 to 99.*ids from -9",
    ),
    "a prompt of padding": (
        tokens(padding_mask=MASK * 0),
        "at least one token.*none in prompt 0.*Leave it out",
    ),
    "padding in the middle": (
        tokens(padding_mask=np.array([[1, 0, 1, 1, 0, 0, 0, 0]])),
        r"padded at their end.*\[1, 0, 1, 1",
    ),
    "padding in front": (
        tokens(padding_mask=MASK[:, ::-1]),
        r"padded at their end.*\[0, 0, 0, 0, 1",
    ),
    "a stream of nothing, without a start token": (
        lambda folder: model_without_start().stream(""),
        "`text`.*at least one token.*no start token",
    ),
    "a stream that is cut in the middle": (
        stream("the", truncation="middle"),
        "`truncation`.*'middle'",
    ),
    "a stream of bytes": (stream(b"the"), "`text`.*b'the'"),
    "a stream of several prompts": (stream(["a", "b"]), "`text`.*'a'"),
    "a stream of no tokens": (stream("the", 0), NEW + "0"),
    "a stream of half a token": (stream("the", 1.5), NEW + "1.5"),
    "a stream that is too long": (stream("the", 64), "64 positions"),
    "a stream without a preprocessor": (
        lambda folder: token_model().stream("the"),
        "`preprocessor`.*None",
    ),
    "a session of nothing": (session("send", ""), "`text`.*not empty"),
    "a session of no tokens": (session("send", "the", 0), NEW + "0"),
    "a session of fractional tokens": (
        session("stream_tokens", [1.5]),
        r"`token_ids`.*integers in one dimension.*\[1\.5\]",
    ),
    "a session of rows": (
        session("stream_tokens", [[1, 2]]),
        r"`token_ids`.*one dimension.*\[\[1, 2\]\]",
    ),
    "a session of another vocabulary": (
        session("stream_tokens", [1000]),
        "ids from 0 to 36.*from 1000",
    ),
    "a session that begins with no tokens": (
        lambda folder: next(text_model().start_session().stream_tokens([])),
        "`token_ids`.*at least one token",
    ),
    "a session that is too long": (session("send", "a", 99), "64 positions"),
    "to rewind backwards": (session("rewind", -1), "`count`.*from 0.*-1"),
    "to rewind too far": (session("rewind", 99), "`count`.*from 0.*99"),
    "to rewind by words": (session("rewind", "all"), "`count`.*'all'"),
    "to save a session as text": (
        session("save", "{folder}/session.txt"),
        r"\*\.safetensors.*session\.txt",
    ),
    "to load text as a session": (
        start("{folder}/kept.txt"),
        r"complete safetensors file.*",
    ),
    "to load a truncated session": (
        start("{folder}/truncated.safetensors"),
        "complete safetensors file.*Save the session again",
    ),
    "to load weights as a session": (
        start("{folder}/weights.safetensors"),
        "file of a session.*Session.save",
    ),
    "to load another model's session": (
        other_session,
        "of this model.*of another one",
    ),
    "a score of one row": (score(TOKENS[0]), r"`token_ids`.*rank 2.*\(8,\)"),
    "a score of a kind": (score(scoring_mode="x"), "`scoring_mode`.*'x'"),
    "a loss without targets": (
        score(scoring_mode="loss"),
        "`target_ids`.*None",
    ),
    "an interceptor of another shape": (
        score(layer_intercept_fn=lambda x, i: x[:, :1]),
        r"`layer_intercept_fn`.*\(1, 8, 32\).*1, 1, 32",
    ),
    "an interceptor of nothing": (
        score(layer_intercept_fn=lambda x, i: None),
        "`layer_intercept_fn`.*None, for layer -1",
    ),
    "a cache without an index": (
        lambda folder: token_model().call_with_cache(
            TOKENS, token_model().backbone.make_cache(1, 8), None
        ),
        "`cache_update_index`.*None",
    ),
    "a stacked cache, as upstream's": (
        lambda folder: token_model().call_with_cache(
            TOKENS, np.zeros((1, 2, 2, 8, 4, 8), "float32"), 0
        ),
        r"one \(key, value\) pair.*\(1, 2, 2, 8, 4, 8\).*stack.*make_cache",
    ),
    "an index without a cache": (
        lambda folder: token_model().call_with_cache(TOKENS, None, 0),
        "`cache_update_index`.*without a `cache`",
    ),
    "a model that is not there": (
        load(keras_nlp_cache.load_model, "{folder}/nowhere.keras"),
        "nowhere.keras",
    ),
    "a model that is text": (
        load(keras_nlp_cache.load_model, "{folder}/kept.txt"),
        "kept.txt",
    ),
    "a preset that is not there": (
        load(models.CausalLM.from_preset, "{folder}/nowhere"),
        "nowhere",
    ),
    "a preset that is a number": (
        lambda folder: models.CausalLM.from_preset(3),
        "preset=3",
    ),
    "a preset of another family": (
        of_another_family,
        "a `GPT2Backbone` for `Mine`.*of a `LlamaBackbone`",
    ),
    "GPTQ without data": (
        lambda folder: token_model().quantize("gptq"),
        "GPTQConfig|config",
    ),
    "to export what was edited": (
        lambda folder: keras_nlp_cache.surgery.remove(
            token_model(), 0
        ).export_to_transformers(str(folder / "exported")),
        "not edited.*Transformers",
    ),
}


def contents(folder):
    return {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def state():
    """All that a bad call could have changed."""
    found = []
    for lm in (text_model(), token_model()):
        found += [to_numpy(x) for x in lm.weights]
        found += [lm.sampler, lm.cache_dtype, str(lm.get_config())]
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with files that calls are told of, made once."""
    path = tmp_path_factory.mktemp("files")
    (path / "kept.txt").write_text("kept")
    fox = text_model().start_session()
    fox.send("the fox", 2, None)
    fox.save(str(path / "whole.safetensors"))
    content = (path / "whole.safetensors").read_bytes()
    (path / "truncated.safetensors").write_bytes(content[:-9])
    safetensors.numpy.save_file(
        {"x": np.zeros(3)}, path / "weights.safetensors"
    )
    return path


@pytest.fixture
def folder(files, tmp_path):
    """A copy of those files, for one call."""
    return shutil.copytree(files, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", divided(CALLS))
def test_mistakes(name, folder):
    call, words = CALLS[name]
    if call is other_session:
        with pytest.raises(ValueError, match=words):
            call(folder)
    before = state()
    if call is of_another_family:
        LLAMA.pair[0].save_to_preset(folder / "llama")
    files = contents(folder)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        call(folder)
    for old, new in zip(before, state(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert contents(folder) == files


MISSING = {
    "a session": (start("{folder}/nowhere.safetensors"), FileNotFoundError),
    "a folder for a session": (start("{folder}"), IsADirectoryError),
    "a folder to save a session in": (
        session("save", "{folder}/nowhere/session.safetensors"),
        FileNotFoundError,
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_files(name, tmp_path):
    call, error = MISSING[name]
    with pytest.raises(error, match=str(tmp_path)):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_there_are_enough():
    tables = (CALLS, MISSING, test_bad_input.CALLS, test_command_line.MISTAKES)
    assert sum(map(len, tables)) >= 60


def test_the_command_line_keeps_files(folder, capsys):
    files = {x: x.read_bytes() for x in folder.rglob("*")}
    for arguments in (
        ["generate", "--preset", str(folder), "hello"],
        ["generate", "--preset", str(folder / "kept.txt"), "hello"],
        ["steer", "hello", "--vector", str(folder / "kept.txt")],
        ["steer", "hello", "--save", str(folder / "nowhere" / "x.gguf")],
    ):
        assert main(arguments) == 2
        assert "keras-nlp-cache: error: " in capsys.readouterr().err
    assert {x: x.read_bytes() for x in folder.rglob("*")} == files


def test_samplers_that_are_not_keras_hubs():
    """What upstream takes is taken: a class, a config, a function."""
    lm = token_model()
    for sampler in (
        keras_hub.samplers.GreedySampler,
        {"class_name": "greedy", "config": {}},
        keras_hub.samplers.GreedySampler(),
    ):
        lm.compile(sampler=sampler)
    lm.compile(sampler="greedy")
