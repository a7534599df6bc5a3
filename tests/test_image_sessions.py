"""A session sees each image once, in the turn that brings it."""

import functools
import re

import numpy as np
import pytest
from keras import ops
from keras import tree

from keras_nlp_cache import device
from tests.families import compiled
from tests.families import every_grid_model
from tests.families import every_image_in_text
from tests.families import every_image_in_turns
from tests.families import FAMILIES
from tests.families import IMAGE_MODELS
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import random_tokens
from tests.families import to_numpy
from tests.test_streaming import lm_with_text

PALI_GEMMA, GEMMA3 = IMAGE_MODELS[:2]
SEE = "<see>"
FIRST = f"the {SEE} fox"
SECOND = f"{SEE} and {SEE} dog"


lm_that_sees = functools.cache(lm_with_text)


@pytest.fixture
def seen(monkeypatch, family):
    """The number of images in each call of the tower."""
    encode = lm_that_sees(family).backbone.encode
    counts = []

    def counted(medium, images, **beside):
        counts.append(len(beside.get("image_grid_thw", images[0])))
        return encode(medium, images, **beside)

    monkeypatch.setattr(lm_that_sees(family).backbone, "encode", counted)
    return counts


def with_marks(family, text):
    return text.replace(SEE, family.mark)


def logits_of(session, images, family):
    """Those of all tokens of a session, read at once and without a cache.

    Args:
        session: A session.
        images: List of arrays, all that were sent.
        family: That of the session.
    """
    token_ids, places = session.token_ids, session._images.places
    sizes = [family.size_of(x) for x in images]
    np.testing.assert_array_equal(session._images.sizes, sizes)
    tokenizer, name = session.lm.preprocessor.tokenizer, family.name_of_token
    assert (token_ids[places] == getattr(tokenizer, name)).all()
    # Of one length, if it is not too long, to be compiled once.
    padded = np.pad(token_ids, (0, -len(token_ids) % 64))[None]
    inputs = family.inputs_of_text(session.lm, padded, places, images)
    # Alone, so that a task over the same weights has compiled the same.
    backbone = compiled(session.lm.backbone)
    logits = to_numpy(session.lm._logits(backbone(inputs)))
    return logits[0, : len(token_ids)]


def assert_greedy(session, images, starts, family):
    """What was generated is the likeliest after all that came before.

    Args:
        session: A session in which each answer has five tokens.
        images: List of arrays, all that were sent.
        starts: Where answers begin.
        family: That of the session.
    """
    token_ids = session.token_ids
    likeliest = logits_of(session, images, family).argmax(axis=-1)
    for start in starts:
        np.testing.assert_array_equal(
            token_ids[start : start + 5], likeliest[start - 1 : start + 4]
        )


@every_image_in_turns
def test_each_turn_reads_what_is_new(family, seen):
    session = lm_that_sees(family).start_session()
    pictures, read, starts, images = family.pictures, 0, [], []
    for text, new in (
        (FIRST, pictures[:1]),
        ("fox", None),
        (SECOND, pictures[::-1]),
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
    other.send(with_marks(family, FIRST), 5, None, images=pictures[1:])
    # Few tokens may be the same after both images, what it has seen is not.
    start = len(other.token_ids) - 5
    assert_greedy(other, pictures[1:], [start], family)
    one, two = (to_numpy(x._images.embeddings)[0] for x in (session, other))
    assert np.abs(one - two).max() > 1e-2


@pytest.fixture
def few_at_a_time():
    """A text is longer than what is read at a time, or shorter."""
    device.set_constants(compiled_chunk=16, eager_chunk=4)
    yield
    device.set_constants()


@every_image_in_turns
def test_what_is_remembered(family, few_at_a_time):
    """A step after all turns is that of a model that reads them at once."""
    lm = lm_that_sees(family)
    lm = family.task(lm.backbone, lm.preprocessor)
    lm.compile(sampler="greedy")
    session, images = lm.start_session(), []
    for text, new in (
        (SECOND, family.pictures[::-1]),
        ("fox", []),
        (FIRST, family.pictures[:1]),
        ("dog", []),
    ):
        session.send(with_marks(family, text), 5, None, images=new)
        images.extend(new)
    full = logits_of(session, images, family)
    cache = tree.map_structure(
        lambda x: ops.convert_to_tensor(to_numpy(x)), session._cache
    )
    token_ids = session.token_ids
    index = len(token_ids) - 1
    step, _, _ = lm.call_with_cache(token_ids[None, -1:], cache, index)
    tolerance = 10 * family.tolerance
    np.testing.assert_allclose(
        to_numpy(step)[0, 0], full[-1], atol=tolerance, rtol=tolerance
    )


@every_image_in_turns
def test_an_image_near_the_last_slot(family):
    """A chunk that would not fit begins earlier, and there is an image.

    Where tokens take the places of those that left a window.
    """
    lm = lm_that_sees(family)
    lm = family.task(lm.backbone, lm.preprocessor)
    lm.compile(sampler="greedy", cache_policy="rotating")
    session, images = lm.start_session(), family.pictures[:1]
    text = random_tokens(1, 225) % 16 + 1
    list(session.stream_tokens(text[0], 5))
    before = len(session.token_ids)
    session.send(with_marks(family, FIRST), 5, None, images=images)
    end = len(session.token_ids)
    # Behind the image is the last token of a chunk that begins before it.
    assert 256 - 32 < session._images.places[0] < end <= 256
    assert_greedy(session, images, [before - 5, end - 5], family)


@every_image_in_turns
def test_many_prompts(family, seen):
    """Each text is what it is alone, its images are seen once."""
    lm, pictures = lm_that_sees(family), family.pictures
    first, second = (with_marks(family, x) for x in (FIRST, SECOND))
    asked = [
        (first, pictures[:1]),
        ("the dog", None),
        (first, pictures[1:]),
        (second, pictures),
    ]
    expected = []
    for text, images in asked:
        session = lm.start_session()
        session.send(text, 5, None, images=images)
        expected.append(session.token_ids[-5:].tolist())
    seen.clear()
    prompts = [
        {"prompt": text, "images": images, "seed": 1} for text, images in asked
    ]
    kwargs = {"stop_token_ids": None, "return_dict": True}
    found = lm.generate_many(iter(prompts), 5, batch_size=2, **kwargs)
    found = [x["token_ids"].tolist() for _, x in sorted(found)]
    assert found == expected
    assert seen == [1, 1, 2]
    seen.clear()
    inputs = {"prompts": [first, "the dog"], "images": [[pictures[1]], []]}
    answers = lm.generate(
        inputs, max_new_tokens=5, num_return_sequences=2, **kwargs
    )
    found = [x["token_ids"].tolist() for x in answers]
    assert found == [expected[2]] * 2 + [expected[1]] * 2
    assert seen == [1]
    one = {"prompts": first, "images": pictures[0]}
    text = lm.generate(one, max_length=60, stop_token_ids=None)
    assert lm.generate(one, max_length=60, **kwargs)["text"] == text


@on_one_backend("what is asked for is checked")
@every_image_in_text
def test_bad_requests(family):
    lm, (picture, _) = lm_that_sees(family), family.pictures
    first = with_marks(family, FIRST)
    prompt, one = {"prompt": first, "images": [picture]}, {"prompts": first}
    for error, kwargs in (
        ("as many .*Received: \\[1\\] of them, for", {"inputs": one}),
        (
            "`prompts`.*`images`, which.*`responses`",
            {"inputs": {**one, "images": picture, "responses": "x"}},
        ),
        ("see none", {"inputs": [prompt], "prompt_lookup_num_tokens": 2}),
        ("`prefix` that is a string", {"inputs": [prompt], "prefix": [1]}),
        (
            "at most 9 .*images are not cut",
            {"inputs": [prompt], "max_length": 9},
        ),
        ("prompt 0, which has", {"inputs": [{**prompt, "prompt": [1, 2]}]}),
        (
            "the keys.*'image'",
            {"inputs": [{"prompt": first, "image": picture}]},
        ),
    ):
        with pytest.raises(ValueError, match=f"(?s)^Expected.*{error}"):
            lm.generate(**{"max_new_tokens": 3, "truncation": "left", **kwargs})
    preprocessor, lm.preprocessor = lm.preprocessor, None
    with pytest.raises(ValueError, match="without `images`.*Set `lm.prepro"):
        list(lm.generate_many([prompt], 3, stop_token_ids=None))
    lm.preprocessor = preprocessor


@every_image_in_turns
def test_forks_and_files(family, tmp_path, seen):
    lm, pictures = lm_that_sees(family), family.pictures
    first, second = (with_marks(family, x) for x in (FIRST, SECOND))
    session = lm.start_session()
    session.send(first, 5, None, images=pictures[:1])
    fork, path = session.fork(), tmp_path / "seen.safetensors"
    session.save(path)
    loaded = lm.start_session(path)
    for x in (session, fork, loaded):
        x.send("dog", 5, None)
        np.testing.assert_array_equal(x.token_ids, session.token_ids)
    for x in (fork, loaded):
        x.send(second, 5, None, images=pictures)
        end = len(x.token_ids)
        assert_greedy(x, [pictures[0], *pictures], [end - 5], family)
    assert seen == [1, 2, 2]
    session.rewind(len(session.token_ids))
    session.send(first, 5, None, images=pictures[:1])
    np.testing.assert_array_equal(
        session.token_ids, fork.token_ids[: len(session.token_ids)]
    )


@every_image_in_text
def test_rewinding(family, seen):
    lm, pictures = lm_that_sees(family), family.pictures
    first, second = (with_marks(family, x) for x in (FIRST, SECOND))
    session = lm.start_session()
    session.send(first, 5, None, images=pictures[:1])
    session.send("dog", 5, None)
    other = session.fork()
    other.send(second, 5, None, images=pictures)
    # Back to before the last two images, and what was there before them.
    other.rewind(len(other.token_ids) - len(session.token_ids))
    for x in (session, other):
        x.send(second, 5, None, images=pictures[::-1])
        x.rewind(2)
        x.send("the fox", 5, None)
    np.testing.assert_array_equal(other.token_ids, session.token_ids)
    images = [pictures[0], *pictures[::-1]]
    assert_greedy(session, images, [len(session.token_ids) - 5], family)
    assert seen == [1, 2, 2, 2]


@every_grid_model
def test_states_do_not_go_back(family):
    session = lm_that_sees(family).start_session()
    images, first = family.pictures[:1], with_marks(family, FIRST)
    session.send(first, 5, None, images=images)
    token_ids = session.token_ids
    for count in (1, 8):
        with pytest.raises(ValueError, match="a state, which cannot go back"):
            session.rewind(count)
    np.testing.assert_array_equal(session.token_ids, token_ids)
    session.send("dog", 5, None)
    assert_greedy(session, images, [len(session.token_ids) - 5], family)


@every_image_in_turns
def test_a_cache_that_was_lost(family, monkeypatch, seen):
    """What is read again is not seen again."""
    lm, pictures = lm_that_sees(family), family.pictures
    session = lm.start_session()
    first, second = (with_marks(family, x) for x in (FIRST, SECOND))
    session.send(first, 5, None, images=pictures[:1])
    before = session.fork()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm.generation_loop, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.send(second, 5, None, images=pictures)
    assert session._cache is None
    session.send("fox", 5, None)
    end = len(session.token_ids)
    assert session.prefilled_tokens > end
    assert_greedy(session, [pictures[0], *pictures], [end - 5], family)
    assert seen == [1, 2]
    assert len(before.token_ids) < end


@on_one_backend("text is made of tokens in the same way on all")
@every_image_in_turns
def test_what_is_streamed_is_what_is_generated(family):
    lm, text = lm_that_sees(family), with_marks(family, FIRST)
    images = family.pictures[:1]
    pieces = list(lm.stream(text, 7, None, images=images))
    # Tokens of images, which a preprocessor may leave out.
    shown, of_images = "".join(pieces), re.compile(r"<[^<>]*>")
    prompt = {"prompts": text, "images": images[0]}
    x = lm.preprocessor.generate_preprocess(prompt, sequence_length=64)
    length = int(np.sum(np.array(x["padding_mask"])))
    expected = lm.generate(
        prompt, max_length=length + 7, stop_token_ids=None, strip_prompt=True
    )
    assert of_images.sub("", shown) == of_images.sub("", expected)
    # One image may come without a list.
    assert pieces == list(lm.stream(text, 7, None, images=images[0]))


@on_one_backend("what is refused does not depend on one")
@every_image_in_turns
def test_what_is_refused(family, seen):
    lm, images = lm_that_sees(family), family.pictures
    session = lm.start_session()
    for text, given, message in (
        (FIRST, None, "no image. Pass `images`.*`Session.send"),
        (FIRST, [], "no image. Pass `images`"),
        ("the fox", images, r"\[0\] of them, for \[2\] images"),
        (SECOND, images[:1], r"\[2\] of them, for \[1\] images"),
        (FIRST, [images[0][..., :1]], r"width, 3\).*\(16, 16, 1\)"),
        (FIRST, [images[0][0]], r"Received shapes: \[\(16, 3\)\]"),
        (FIRST, [images[0][:0]], r"Received shapes: \[\(0, 16, 3\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            text = with_marks(family, text)
            session.send(text, 5, None, images=given)
    assert not len(session.token_ids)
    lm.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match="Received `images`, too.*`send"):
        session.chat("the fox", 5, images=images[:1])
    blind = family.task(lm.backbone, lm.preprocessor)
    blind.preprocessor = FAMILIES[0].preprocessor()
    with pytest.raises(ValueError, match="an `image_converter`.*GPT2Causal"):
        blind.stream("fox", 5, None, images=images[:1])
    assert seen == []


@on_one_backend("what is refused does not depend on one")
def test_what_only_some_refuse():
    lm, text = lm_that_sees(GEMMA3), with_marks(GEMMA3, FIRST)
    session = lm.start_session()
    with pytest.raises(ValueError, match=r"most 2 images.*Received: \[3\]"):
        images = [*IMAGES, IMAGES[0]]
        session.send(3 * GEMMA3.mark, 5, None, images=images)
    session.send(text, 5, None, images=IMAGES[:1])
    first, tokens = session._images.places[0], session.token_ids
    for left in range(first + 1, first + 5):
        with pytest.raises(ValueError, match=f"the image at {first} to"):
            session.rewind(len(tokens) - left)
    np.testing.assert_array_equal(session.token_ids, tokens)
    with pytest.raises(ValueError, match="for a `Gemma.?CausalLM`"):
        lm_with_text(FAMILIES[1]).stream("fox", 5, None, images=IMAGES[:1])
    with pytest.raises(ValueError, match="text begins with an image"):
        lm_with_text(PALI_GEMMA).start_session()


@on_one_backend("what is refused does not depend on one")
@every_grid_model
def test_grids_that_do_not_fit(family, monkeypatch, seen):
    lm, text = lm_that_sees(family), with_marks(family, FIRST)
    images, made = family.pictures[:1], lm.preprocessor.generate_preprocess
    with pytest.raises(ValueError, match="a token of text after them.*1 `imag"):
        lm.stream("the <|image_pad|>", 5, None, images=images)
    for name, change, message in (
        ("image_grid_thw", lambda x: 0 * x + [1, 2, 2], r"of \[1\] tokens"),
        ("image_grid_thw", lambda x: x[:0], r"1 `images` of \[\] tokens"),
        ("pixel_values", lambda x: x[:-1], "the 16 patches.*Received: 15"),
        ("pixel_values", lambda x: x[..., :2], r"width=4.*4, 2\)"),
        ("vision_indices", lambda x: x + [0, 0, 0, 1], r"of \[4\] tokens"),
    ):

        def changed(*args, name=name, change=change, **kwargs):
            x = made(*args, **kwargs)
            if name in x:
                x[name] = change(to_numpy(x[name]))
            return x

        with monkeypatch.context() as patch:
            patch.setattr(lm.preprocessor, "generate_preprocess", changed)
            with pytest.raises(ValueError, match=message):
                lm.stream(text, 5, None, images=images)
    assert seen == []


@on_one_backend("files are the same on all")
@every_image_in_turns
def test_files_that_are_damaged(family, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path, lm = tmp_path / "seen.safetensors", lm_that_sees(family)
    session = lm.start_session()
    text, images = with_marks(family, FIRST), family.pictures[:1]
    session.send(text, 5, None, images=images)
    session.save(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    places, sizes = tensors["images.places"], tensors["images.sizes"]
    for change in (
        {"images.places": places[:-1]},
        {"images.places": places[::-1].copy()},
        {"images.places": places + len(session.token_ids)},
        {"images.places": places + np.int32([0, 0, 0, 1])},
        {"images.embeddings": tensors["images.embeddings"][..., :-1].copy()},
        {"images.embeddings": tensors["images.embeddings"][:-1].copy()},
        {"images.sizes": sizes[:0]},
        {"images.sizes": sizes[0]},
        {"images.sizes": -sizes},
        {"images.sizes": sizes + np.int32([0, 1])},
        {"images.places": None},
        {"images.sizes": None},
    ):
        changed = {**tensors, **change}
        changed = {k: x for k, x in changed.items() if x is not None}
        save_file(changed, path, metadata)
        with pytest.raises(ValueError, match="images that do not fit"):
            lm.start_session(path)
