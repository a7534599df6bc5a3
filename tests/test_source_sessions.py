"""A decoder goes on with its text, turn by turn, after one thing was read."""

import keras
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from keras_nlp_cache import surgery
from keras_nlp_cache.generate.loops import generation
from tests.families import ENCODER_DECODERS
from tests.families import every_encoder_decoder
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import SOUND
from tests.families import to_numpy

T5 = next(x for x in ENCODER_DECODERS if x.name == "t5")


def prompt_for(family, row=0):
    if family.source is SOUND:
        return {"audio": SOUND["encoder_input_values"][row, :, 0]}
    words = ("the quick brown fox", "airplane at airport")[row]
    if "images" in family.source:
        return {"images": IMAGES[row], "encoder_text": words}
    return words


def with_start(family):
    """The same with words that the decoder's text begins with."""
    prompt = prompt_for(family)
    if family.source is SOUND:
        return {**prompt, "text": "the fox"}
    if isinstance(prompt, str):
        prompt = {"encoder_text": prompt}
    return {**prompt, "decoder_text": "the fox"}


def likeliest(session, source=None):
    """What a call without a cache says after each token of a session."""
    token_ids = session.token_ids[None]
    # Of few lengths, for little to be compiled.
    padded = np.pad(token_ids, ((0, 0), (0, -token_ids.shape[1] % 32)))
    logits = session.lm(
        {
            **(source or session._source),
            "decoder_token_ids": padded,
            "decoder_padding_mask": np.ones_like(padded),
        }
    )
    return to_numpy(logits)[0].argmax(axis=-1)[: token_ids.shape[1]]


def assert_greedy(session, start, end=None):
    """Tokens from `start` on are the likeliest after those before them."""
    np.testing.assert_array_equal(
        session.token_ids[start:end],
        likeliest(session)[start - 1 : (end or len(session.token_ids)) - 1],
    )


@every_encoder_decoder
def test_turns(family, tmp_path):
    lm = family.text_lm()
    lm.compile(sampler="greedy")
    session = lm.start_session(prompt=with_start(family))
    start = len(session.token_ids)
    said = session.text
    assert said.endswith("the fox")
    answer = session.send("", 4, None)
    assert session.text.startswith(said) and len(session.token_ids) == start + 4
    assert session.prefilled_tokens == start - 1
    assert_greedy(session, start)

    # Forked, rewound and read from a file, each goes on by itself.
    fork = session.fork()
    middle = len(session.token_ids)
    session.send("airplane", 3, None)
    end = len(session.token_ids)
    assert session.prefilled_tokens == start - 1 + end - 3 - middle
    assert_greedy(session, end - 3)
    assert len(fork.token_ids) == middle
    fork.rewind(2)
    fork.save(tmp_path / "talk.safetensors")
    loaded = lm.start_session(tmp_path / "talk.safetensors")
    np.testing.assert_array_equal(
        loaded.token_ids, session.token_ids[: -2 - (end - middle)]
    )
    for x in (fork, loaded):
        x.send("the dog", 3, None)
        assert_greedy(x, len(x.token_ids) - 3)
    np.testing.assert_array_equal(fork.token_ids, loaded.token_ids)
    # What is rewound to was in the file, the last token with it.
    assert loaded.prefilled_tokens == len(loaded.token_ids) - 4 - (middle - 2)

    # As `stream()`, which is of one turn, and as `generate()`.
    whole = lm.generate(
        with_start(family),
        max_new_tokens=4,
        stop_token_ids=None,
        return_dict=True,
    )
    np.testing.assert_array_equal(
        whole["token_ids"], session.token_ids[start:middle]
    )
    pieces = lm.stream(with_start(family), 4, None)
    assert "".join(pieces) == answer


@every_encoder_decoder
def test_the_encoder_runs_once(family, monkeypatch):
    lm = family.text_lm()
    lm.compile(sampler="greedy", run_eagerly=True)
    calls = []
    block = lm.backbone.encoder_blocks[0]
    call = block.call

    def counted(*args, **kwargs):
        calls.append(args)
        return call(*args, **kwargs)

    monkeypatch.setattr(block, "call", counted)
    session = lm.start_session(prompt=prompt_for(family))
    assert not calls
    for _ in range(2):
        session.send("the", 2, None)
        session = session.fork()
        session.rewind(1)
    assert len(calls) == 1


def test_what_is_read_matters():
    """Sessions of two texts, of one model, are not in each other's way."""
    lm = T5.text_lm()
    sessions = [lm.start_session(prompt=prompt_for(T5, i)) for i in range(2)]
    for _ in range(2):
        for x in sessions:
            x.send("", 3, None)
    for x, other in zip(sessions, sessions[::-1]):
        assert_greedy(x, 1)
        assert (x.token_ids[1:] != likeliest(x, other._source)[:-1]).any()


@pytest.mark.parametrize("policy", [None, "int8", "rotating"])
def test_a_session_outgrows_its_cache(policy, monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "FEWEST_SLOTS", 8)
    lm = T5.text_lm()
    lm.compile(sampler="greedy", cache_policy=policy, cache_dtype="bfloat16")
    sessions = []
    for turns in ((4, 20), (24,)):
        session = lm.start_session(prompt=prompt_for(T5))
        for count in turns:
            session.send("", count, None)
            session.save(tmp_path / "talk.safetensors")
            session = lm.start_session(path=tmp_path / "talk.safetensors")
        sessions.append(session.token_ids)
    np.testing.assert_array_equal(*sessions)


def test_an_edit_of_the_encoder():
    lm = T5.text_lm()
    edited = surgery.insert_after(lm, "encoder.0", keras.layers.Rescaling(-3.0))
    edited.compile(sampler="greedy")
    session = edited.start_session(prompt=prompt_for(T5))
    session.send("", 5, None)
    assert_greedy(session, 1)
    other = lm.start_session(prompt=prompt_for(T5))
    other.send("", 5, None)
    assert (session.token_ids != other.token_ids).any()


def damaged(path, change):
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


DAMAGES = {
    "nothing for the encoder": lambda x: x.pop("source.encoder_token_ids"),
    "something else for the encoder .*batch of 1 prompts": lambda x: x.update(
        {
            "source.encoder_token_ids": x["source.encoder_token_ids"][
                :, 1:
            ].copy()
        }
    ),
    "block 1 incomplete": lambda x: x.pop("key.1"),
    r"key.1.mask incomplete": lambda x: x.update(
        {"key.1.mask": x["key.1.mask"][..., :-1].copy()}
    ),
    "more keys than tokens": lambda x: x.pop("key.1.mask"),
}


@on_one_backend("files are read")
@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files(message, tmp_path):
    lm = T5.text_lm()
    session = lm.start_session(prompt=prompt_for(T5))
    session.send("", 2, None)
    path = tmp_path / "talk.safetensors"
    session.save(path)
    damaged(path, DAMAGES[message])
    with pytest.raises(ValueError, match=message):
        lm.start_session(path)


@on_one_backend("files are read")
def test_files_of_another_kind(tmp_path):
    lm = T5.text_lm()
    path = tmp_path / "talk.safetensors"
    session = lm.start_session(prompt=prompt_for(T5))
    session.save(path)  # Before anything was read.
    loaded = lm.start_session(path)
    for x in (session, loaded):
        x.send("", 2, None)
    np.testing.assert_array_equal(session.token_ids, loaded.token_ids)
    loaded.save(path)
    lm.compile(sampler="greedy", cache_dtype="float16")
    lm.start_session(path).send("", 2, None)
    lm.compile(sampler="greedy", cache_policy="int8")
    with pytest.raises(ValueError, match="Received a session of another one"):
        lm.start_session(path)
    other = T5.text_lm()
    other.backbone.set_weights([2 * x for x in lm.backbone.get_weights()])
    with pytest.raises(ValueError, match="to be of this model"):
        other.start_session(path)


@every_encoder_decoder
def test_what_is_refused(family):
    lm = family.text_lm()
    for given, message in (
        ({}, "neither of them"),
        ({"prompt": prompt_for(family), "path": "x"}, "both of them"),
    ):
        with pytest.raises(ValueError, match=f"`prompt`.*`path`.*{message}"):
            lm.start_session(**given)
    session = lm.start_session(prompt=prompt_for(family))
    for x in (lm, session):
        for method in ("chat", "stream_chat"):
            with pytest.raises(
                ValueError, match=rf"without an encoder for `{method}\(\)`"
            ):
                getattr(x, method)("the fox")
    with pytest.raises(ValueError, match="`text` to be a string.*3"):
        session.send(3)
    count = len(session.token_ids)
    with pytest.raises(ValueError, match=f"to {count - 1}, .* but for the fir"):
        session.rewind(count)
    session.send("the fox", 2, None)
    session.rewind(len(session.token_ids) - 1)
    session.send("", 2, None)
    assert_greedy(session, 1)
    with pytest.raises(ValueError, match="`preprocessor`"):
        family.lm_pair[0].start_session(prompt=prompt_for(family))
    # Which no model of keras_hub that has an encoder does.
    assert not hasattr(family.upstream(family.kind), "score")
    with pytest.raises(ValueError, match=r"`score\(\)`.*decoder_token_ids"):
        lm.score(session.token_ids)
