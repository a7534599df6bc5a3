"""A session sees each image once, in the turn that brings it."""

import functools

import numpy as np
import pytest

from tests.families import compiled
from tests.families import every_image_in_text
from tests.families import FAMILIES
from tests.families import IMAGE_MODELS
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import random_tokens
from tests.families import to_numpy
from tests.test_streaming import lm_with_text

PALI_GEMMA, GEMMA3 = IMAGE_MODELS[:2]
SEE = "<start_of_image>"
FIRST = f"the {SEE} fox"
SECOND = f"{SEE} and {SEE} dog"


_lm = functools.cache(lm_with_text)


def lm_that_sees(family=GEMMA3):
    return _lm(family)


@pytest.fixture
def family():
    """The family of a test that is not run with several."""
    return GEMMA3


@pytest.fixture
def seen(monkeypatch, family):
    """The number of images in each call of the tower."""
    encode_images = lm_that_sees(family).backbone.encode_images
    counts = []

    def counted(images, **beside):
        counts.append(images.shape[1])
        return encode_images(images, **beside)

    monkeypatch.setattr(lm_that_sees(family).backbone, "encode_images", counted)
    return counts


def with_marks(family, text):
    return text.replace(SEE, family.mark)


def assert_greedy(session, images, starts, family=GEMMA3):
    """What was generated is the likeliest after all that came before.

    Args:
        session: A session in which each answer has five tokens.
        images: List of arrays, all that were sent.
        starts: Where answers begin.
        family: That of the session.
    """
    token_ids = session.token_ids
    # Of one length, if it is not too long, to be compiled once.
    padded = np.pad(token_ids, (0, -len(token_ids) % 64))[None]
    places = session._images.places
    tokenizer = session.lm.preprocessor.tokenizer
    assert len(places) == 4 * len(images)
    assert (token_ids[places] == tokenizer.image_placeholder_id).all()
    # What is not needed of three images is 0.
    seen = np.zeros((1, 3, *IMAGES.shape[1:]), "float32")
    seen[0, : len(images)] = images
    mask = np.zeros_like(padded)
    mask[0, places] = 1
    inputs = {
        **family.read(seen),
        "token_ids": padded,
        "padding_mask": np.ones_like(padded),
        "vision_indices": np.pad(places, (0, 12 - len(places)))[None],
        "vision_mask": mask,
    }
    # Alone, so that a task over the same weights has compiled the same.
    backbone = compiled(session.lm.backbone)
    logits = session.lm.backbone.token_embedding(backbone(inputs), reverse=True)
    likeliest = to_numpy(logits)[0].argmax(axis=-1)
    for start in starts:
        np.testing.assert_array_equal(
            token_ids[start : start + 5], likeliest[start - 1 : start + 4]
        )


@every_image_in_text
def test_each_turn_reads_what_is_new(family, seen):
    session = lm_that_sees(family).start_session()
    read, starts, images = 0, [], []
    for text, new in (
        (FIRST, IMAGES[:1]),
        ("fox", None),
        (SECOND, IMAGES[::-1]),
        ("the dog", []),
    ):
        before = len(session.token_ids)
        session.send(with_marks(family, text), 5, None, images=new)
        starts.append(len(session.token_ids) - 5)
        images.extend(() if new is None else new)
        # The last token of a text is read by the step that follows it.
        read += starts[-1] - before - (before == 0)
        assert session.prefilled_tokens == read
    assert_greedy(session, images, starts, family)
    assert seen == [1, 2]
    other = lm_that_sees(family).start_session()
    other.send(with_marks(family, FIRST), 5, None, images=IMAGES[1:])
    # Few tokens may be the same after both images, what it has seen is not.
    assert_greedy(other, IMAGES[1:], starts[:1], family)
    one, two = (to_numpy(x._images.embeddings)[0] for x in (session, other))
    assert np.abs(one - two).max() > 1e-2


def test_an_image_near_the_last_slot():
    """A chunk that would not fit begins earlier, and there is an image.

    Where tokens take the places of those that left a window.
    """
    lm = GEMMA3.task(lm_that_sees().backbone, lm_that_sees().preprocessor)
    lm.compile(sampler="greedy", cache_policy="rotating")
    session = lm.start_session()
    text = random_tokens(1, 225) % 16 + 1
    list(session.stream_tokens(text[0], 5))
    before = len(session.token_ids)
    session.send(FIRST, 5, None, images=IMAGES[:1])
    end = len(session.token_ids)
    # Behind the image is the last token of a chunk that begins before it.
    assert 256 - 32 < session._images.places[0] < end <= 256
    assert_greedy(session, IMAGES[:1], [before - 5, end - 5])


@every_image_in_text
def test_forks_rewinding_and_files(family, tmp_path, seen):
    lm = lm_that_sees(family)
    first, second = (with_marks(family, x) for x in (FIRST, SECOND))
    session = lm.start_session()
    session.send(first, 5, None, images=IMAGES[:1])
    fork, path = session.fork(), tmp_path / "seen.safetensors"
    session.save(path)
    loaded = lm.start_session(path)
    for x in (session, fork, loaded):
        x.send("dog", 5, None)
        np.testing.assert_array_equal(x.token_ids, session.token_ids)
    loaded.send(second, 5, None, images=IMAGES)
    end = len(loaded.token_ids)
    assert_greedy(loaded, [IMAGES[0], *IMAGES], [end - 5], family)
    # Back to before the last two images, and what was there before them.
    loaded.rewind(end - len(session.token_ids))
    for x in (session, loaded):
        x.send(second, 5, None, images=IMAGES[::-1])
        x.rewind(2)
        x.send("the fox", 5, None)
    np.testing.assert_array_equal(loaded.token_ids, session.token_ids)
    assert_greedy(
        session,
        [IMAGES[0], *IMAGES[::-1]],
        [len(session.token_ids) - 5],
        family,
    )
    assert seen == [1, 2, 2, 2]
    session.rewind(len(session.token_ids))
    session.send(first, 5, None, images=IMAGES[:1])
    np.testing.assert_array_equal(
        session.token_ids, fork.token_ids[: len(session.token_ids)]
    )


def test_a_cache_that_was_lost(monkeypatch, seen):
    """What is read again is not seen again."""
    session = lm_that_sees().start_session()
    session.send(FIRST, 5, None, images=IMAGES[:1])
    before = session.fork()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm_that_sees().generation_loop, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.send(SECOND, 5, None, images=IMAGES)
    assert session._cache is None
    session.send("fox", 5, None)
    end = len(session.token_ids)
    assert session.prefilled_tokens > end
    assert_greedy(session, [IMAGES[0], *IMAGES], [end - 5])
    assert seen == [1, 2]
    assert len(before.token_ids) < end


@on_one_backend("text is made of tokens in the same way on all")
def test_what_is_streamed_is_what_is_generated():
    lm = lm_that_sees()
    pieces = list(lm.stream(FIRST, 7, None, images=IMAGES[:1]))
    prompt = {"prompts": FIRST, "images": IMAGES[0]}
    x = lm.preprocessor.generate_preprocess(prompt, sequence_length=64)
    length = int(np.sum(np.array(x["padding_mask"])))
    assert "".join(pieces) == lm.generate(
        prompt, max_length=length + 7, stop_token_ids=None, strip_prompt=True
    )
    # One image may come without a list.
    assert pieces == list(lm.stream(FIRST, 7, None, images=IMAGES[0]))


@on_one_backend("what is refused does not depend on one")
def test_what_is_refused():
    lm = lm_that_sees()
    session = lm.start_session()
    for text, images, message in (
        (FIRST, None, "no image. Pass `images`.*`Session.send"),
        (FIRST, [], "no image. Pass `images`"),
        ("the fox", IMAGES, r"\[0\] of them, for \[2\] images"),
        (SECOND, IMAGES[:1], r"\[2\] of them, for \[1\] images"),
        (SEE * 3, [*IMAGES, IMAGES[0]], r"most 2 images.*Received: \[3\]"),
        (FIRST, [IMAGES[0][..., :1]], r"width, 3\).*\(16, 16, 1\)"),
        (FIRST, [IMAGES[0][0]], r"Received shapes: \[\(16, 3\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            session.send(text, 5, None, images=images)
    assert not len(session.token_ids)
    session.send(FIRST, 5, None, images=IMAGES[:1])
    first, tokens = session._images.places[0], session.token_ids
    for left in range(first + 1, first + 5):
        with pytest.raises(ValueError, match=f"the image at {first} to"):
            session.rewind(len(tokens) - left)
    np.testing.assert_array_equal(session.token_ids, tokens)
    lm.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match="Received `images`, too.*`send"):
        session.chat("the fox", 5, images=IMAGES[:1])
    with pytest.raises(ValueError, match="for a `Gemma.?CausalLM`"):
        lm_with_text(FAMILIES[1]).stream("fox", 5, None, images=IMAGES[:1])
    with pytest.raises(ValueError, match="text begins with an image"):
        lm_with_text(PALI_GEMMA).start_session()


@on_one_backend("files are the same on all")
def test_files_that_are_damaged(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "seen.safetensors"
    session = lm_that_sees().start_session()
    session.send(FIRST, 5, None, images=IMAGES[:1])
    session.save(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    places = tensors["images.places"]
    for change in (
        {"images.places": places[:-1]},
        {"images.places": places[::-1].copy()},
        {"images.places": places + len(session.token_ids)},
        {"images.embeddings": tensors["images.embeddings"][..., :-1].copy()},
        {"images.places": None},
    ):
        changed = {**tensors, **change}
        changed = {k: x for k, x in changed.items() if x is not None}
        save_file(changed, path, metadata)
        with pytest.raises(ValueError, match="images that do not fit"):
            lm_that_sees().start_session(path)
