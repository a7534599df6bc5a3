"""A session goes on with the cache it has, and says what it would have said."""

import pathlib

import keras
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.families import assert_greedy
from tests.families import deep_suites
from tests.families import FAMILIES
from tests.test_streaming import lm_with_text

GPT2, LLAMA = FAMILIES[0], FAMILIES[3]
# Longer than the smallest cache that all families' positions allow.
TURNS = ("the fox", "the quick dog", "fox")


def new_lm(family, **kwargs):
    return lm_with_text(family, **kwargs)


def assert_session_is_greedy(session, start):
    token_ids = session.token_ids
    # Of a few lengths only, since JAX compiles each operation for each.
    padded = np.pad(token_ids, (0, -len(token_ids) % 64))[None]
    assert_greedy(session.lm, padded, start, len(token_ids))


@deep_suites
def test_each_turn_reads_what_is_new(family):
    lm = new_lm(family)
    session = lm.start_session()
    read = 0
    for turn in TURNS:
        before = len(session.token_ids)
        answer = session.send(turn, max_new_tokens=5, stop_token_ids=None)
        sent = len(session.token_ids) - 5 - before
        # The last token of a text is read by the step that follows it.
        read += sent - 1 if before == 0 else sent
        assert session.prefilled_tokens == read
        assert_session_is_greedy(session, before + sent)
        assert session.text.endswith(answer)
    start = getattr(lm.preprocessor.tokenizer, "start_token_id", None)
    if lm.preprocessor.add_start_token and start is not None:
        assert list(session.token_ids).count(start) == 1


def test_a_session_outgrows_its_cache():
    lm = new_lm(LLAMA)
    session = lm.start_session()
    session.send("the fox", max_new_tokens=100, stop_token_ids=None)
    read = session.prefilled_tokens
    before = len(session.token_ids)
    session.send("the dog", max_new_tokens=200, stop_token_ids=None)
    sent = len(session.token_ids) - before - 200
    assert session.prefilled_tokens == read + sent
    assert_session_is_greedy(session, before + sent)


@deep_suites
def test_forks_go_their_own_way(family):
    lm = new_lm(family)
    session = lm.start_session()
    session.send("the fox", 5, None)
    fork = session.fork()
    np.testing.assert_array_equal(fork.token_ids, session.token_ids)
    before = len(session.token_ids)
    session.send("dog", 5, None)
    assert len(fork.token_ids) == before
    fork.send("the quick", 5, None)
    for x in (session, fork):
        assert_session_is_greedy(x, len(x.token_ids) - 5)
    assert fork.prefilled_tokens < len(fork.token_ids) - 5


@deep_suites
def test_rewind(family):
    lm = new_lm(family)
    session = lm.start_session()
    session.send("the fox", 5, None)
    tokens = session.token_ids
    session.rewind(3)
    np.testing.assert_array_equal(session.token_ids, tokens[:-3])
    read = session.prefilled_tokens
    before = len(session.token_ids)
    session.send("dog", 5, None)
    sent = len(session.token_ids) - 5 - before
    # What is rewound to has been in the cache all along.
    assert session.prefilled_tokens == read + sent - 1
    assert_session_is_greedy(session, before + sent)
    session.rewind(len(session.token_ids))
    assert session.text == ""
    session.send("the fox", 5, None)
    np.testing.assert_array_equal(session.token_ids, tokens)
    for count in (-1, len(tokens) + 1, 1.0, True, "1"):
        with pytest.raises(ValueError, match="`count`.*from 0 to"):
            session.rewind(count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files(tmp_path, dtype):
    lm = new_lm(LLAMA, dtype=dtype)
    path = tmp_path / "talk.safetensors"
    session = lm.start_session()
    session.save(path)
    assert not len(lm.start_session(path).token_ids)
    session.send("the fox", 5, None)
    session.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = lm.start_session(path)
    np.testing.assert_array_equal(loaded.token_ids, session.token_ids)
    for x in (session, loaded):
        x.send("dog", 5, None)
    np.testing.assert_array_equal(loaded.token_ids, session.token_ids)
    # From the file came all but the text that was sent after it.
    sent = len(session.token_ids) - 5 - len(lm.start_session(path).token_ids)
    assert loaded.prefilled_tokens == sent
    with safe_open(path, framework="numpy") as file:
        assert file.get_tensor("key.0").shape[2] < 20  # No empty slots.


def test_the_same_model_built_again_reads_a_session(tmp_path):
    lm = new_lm(GPT2)
    session = lm.start_session()
    session.send("the fox", 5, None)
    session.save(tmp_path / "talk.safetensors")
    again = new_lm(GPT2)
    again.backbone.set_weights(lm.backbone.get_weights())
    loaded = again.start_session(tmp_path / "talk.safetensors")
    loaded.send("dog", 5, None)
    session.send("dog", 5, None)
    np.testing.assert_array_equal(loaded.token_ids, session.token_ids)


def other_weights(lm):
    lm.backbone.set_weights([x * 1.5 for x in lm.backbone.get_weights()])
    return lm


def edited(lm):
    from keras_nlp_cache import surgery

    lm = surgery.insert_after(lm, 0, keras.layers.Rescaling(0.5))
    lm.compile(sampler="greedy")
    return lm


@pytest.mark.parametrize("change", [other_weights, edited])
def test_files_of_another_model_are_refused(tmp_path, change):
    lm = new_lm(GPT2)
    session = lm.start_session()
    session.send("the fox", 5, None)
    path = tmp_path / "talk.safetensors"
    session.save(path)
    lm = change(lm)
    session = lm.start_session()
    session.send("the dog", 3, None)
    tokens = session.token_ids
    with pytest.raises(ValueError, match="of this model"):
        session.load(path)
    np.testing.assert_array_equal(session.token_ids, tokens)
    session.send("fox", 3, None)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def not_a_session(path):
    save_file({"x": np.zeros(3, "float32")}, path)


def text_file(path):
    path.write_text("the fox")


def without_a_block(path):
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    del tensors["value.1"]
    save_file(tensors, path, metadata)


def with_other_tokens(path):
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    tensors["token_ids"] = tensors["token_ids"][:2]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncated, "complete safetensors file"),
        (text_file, "complete safetensors file"),
        (not_a_session, "file of a session"),
        (without_a_block, "block 1 incomplete"),
        (with_other_tokens, "more keys than tokens"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, words):
    lm = new_lm(GPT2)
    session = lm.start_session()
    session.send("the fox", 5, None)
    path = tmp_path / "talk.safetensors"
    session.save(path)
    damage(path)
    with pytest.raises(ValueError, match=words):
        lm.start_session(path)


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    lm = new_lm(GPT2)
    session = lm.start_session()
    with pytest.raises(ValueError, match=r"\*\.safetensors"):
        session.save(tmp_path / "talk.bin")
    with pytest.raises(OSError):
        session.save(tmp_path / "nowhere" / "talk.safetensors")
    path = tmp_path / "talk.safetensors"
    session.save(path)
    before = path.read_bytes()
    session.send("the fox", 5, None)

    def full(self, content):
        self.open("wb").write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_an_answer_that_is_left_early_goes_on():
    lm = new_lm(LLAMA)
    session = lm.start_session()
    answer = session.stream("the fox", 10, None)
    for _ in range(3):
        next(answer)
    before = len(session.token_ids)
    session.send("dog", 4, None)
    sent = len(session.token_ids) - before - 4
    assert_session_is_greedy(session, before + sent)
    with pytest.raises(RuntimeError, match="left alone"):
        next(answer)
    assert_session_is_greedy(session, before + sent)


def test_an_interrupted_step_leaves_a_session_that_goes_on(monkeypatch):
    lm = new_lm(LLAMA)
    session = lm.start_session()
    session.send("the fox", 4, None)
    tokens = session.token_ids

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for method in ("prefill", "steps"):
        with monkeypatch.context() as patch:
            patch.setattr(type(lm.generation_loop), method, interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.send("dog", 4, None)
        kept = len(session.token_ids)
        np.testing.assert_array_equal(session.token_ids[: len(tokens)], tokens)
        session.send("fox", 4, None)
        assert_session_is_greedy(session, len(session.token_ids) - 4)
        session.rewind(len(session.token_ids) - kept)


def test_a_model_that_changes_goes_on():
    """Another loop, as after `compile()`, takes the cache over."""
    lm = new_lm(LLAMA)
    session = lm.start_session()
    session.send("the fox", 4, None)
    for options in ({"run_eagerly": True}, {}):
        lm.compile(sampler="greedy", **options)
        read = session.prefilled_tokens
        before = len(session.token_ids)
        session.send("dog", 4, None)
        sent = len(session.token_ids) - before - 4
        assert session.prefilled_tokens == read + sent
        assert_session_is_greedy(session, before + sent)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"text": None}, "`text`.*None"),
        ({"text": b"the"}, "`text`.*b'the'"),
        ({"text": ["the"]}, "`text`"),
        ({"text": "the", "max_new_tokens": 0}, "`max_new_tokens`.*0"),
        ({"text": "the", "max_new_tokens": -1}, "`max_new_tokens`.*-1"),
        ({"text": "the", "max_new_tokens": 2.0}, "`max_new_tokens`.*2.0"),
        ({"text": "the", "max_new_tokens": True}, "`max_new_tokens`.*True"),
        ({"text": "the", "max_new_tokens": None}, "`max_new_tokens`.*None"),
        ({"text": "the", "max_new_tokens": 64}, "64 positions"),
        ({"text": "the", "truncation": "middle"}, "`truncation`.*'middle'"),
        ({"text": "the", "truncation": None}, "`truncation`.*None"),
        ({"text": "the", "stop_token_ids": "never"}, "`stop_token_ids`"),
        ({"text": "the", "stop_token_ids": [1.5]}, "`stop_token_ids`.*1.5"),
        ({"text": "the", "stop_token_ids": {"a": 1}}, "`stop_token_ids`.*a"),
    ],
)
def test_mistakes_change_nothing(arguments, words):
    lm = new_lm(GPT2)
    session = lm.start_session()
    session.send("the fox", 3, None)
    tokens = session.token_ids
    for method in (session.send, session.stream):
        with pytest.raises(ValueError, match=words):
            method(**arguments)
    text = arguments.pop("text")
    with pytest.raises(ValueError, match=words):
        lm.stream(text, **arguments)
    np.testing.assert_array_equal(session.token_ids, tokens)
    session.send("dog", 3, None)
    assert_session_is_greedy(session, len(session.token_ids) - 3)


def test_models_that_cannot_have_sessions():
    lm = GPT2.lm_pair[0]
    for method in (lm.start_session, lambda: lm.stream("the fox")):
        with pytest.raises(ValueError, match="`preprocessor`"):
            method()
    lm = new_lm(GPT2)
    lm.compile(sampler="beam")
    with pytest.raises(ValueError, match="BeamSampler.*loop of its own"):
        lm.stream("the fox")
