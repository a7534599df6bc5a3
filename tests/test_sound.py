"""A decoder reads sound, and images with it: once, or what is cached of it."""

import functools
import inspect

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.families import compiled
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import taking_turns
from tests.families import to_numpy
from tests.families import XLA
from tests.sound_families import CLIPS
from tests.sound_families import LENGTH
from tests.sound_families import SOUND_MODELS
from tests.sound_families import WAVES

TOKENS = random_tokens(2, LENGTH)
MASK = np.ones_like(TOKENS)
# Of prompts, with room for what is generated.
TEXT = random_tokens(2, LENGTH + 6, seed=1)

every_sound_model = pytest.mark.parametrize(
    "family", [pytest.param(x, id=x.name) for x in SOUND_MODELS]
)
# Where each is compiled, one of them.
some_sound_model = taking_turns(SOUND_MODELS, jax=1, tensorflow=1)
# All that there is, of which others have less.
*_, BOTH = SOUND_MODELS
one_sound_model = pytest.mark.parametrize(
    "family", [pytest.param(BOTH, id=BOTH.name)]
)


def full_forward(backbone, family, **changes):
    """What becomes of sound and text without a cache."""
    return to_numpy(backbone({**family.inputs(TOKENS, MASK), **changes}))


def part(family, start, end, clips=slice(None)):
    """The inputs of some tokens, and of the clips that stand among them."""
    inputs = family.inputs(TOKENS, MASK)
    found = {"token_ids": TOKENS[:, start:end]}
    of_clips = inputs["audio_mel"][:, clips]
    if of_clips.shape[1]:
        places = inputs["audio_indices"].reshape(2, 2, -1)[:, clips]
        places = np.where(places, places - start, 0).reshape(2, -1)
        found |= {
            "audio_mel": of_clips,
            "audio_mel_mask": inputs["audio_mel_mask"][:, clips],
            "audio_indices": places,
            "audio_mask": inputs["audio_mask"][:, start:end],
        }
    if family.sees and end == LENGTH:
        images = "pixel_values", "pixel_position_ids"
        found |= {name: inputs[name] for name in images}
        found["vision_indices"] = inputs["vision_indices"] - start
        found["vision_mask"] = inputs["vision_mask"][:, start:]
    return found


def cached_forward(backbone, parts, call=None):
    """The same through a cache, of inputs that follow each other."""
    cache, index, found = backbone.make_cache(2, LENGTH), 0, []
    for now in parts:
        output, cache = (call or backbone)(
            {**now, "cache": cache, "cache_update_index": index}
        )
        found.append(to_numpy(output))
        index += now["token_ids"].shape[1]
    return np.concatenate(found, axis=1)


@functools.cache
def greedy(family):
    """A task over `family.pair`, which stays compiled."""
    lm = family.task(family.pair[0])
    lm.compile(sampler="greedy", **XLA)
    return lm


def prompts(family, lengths):
    """What a task is called with, for prompts of some lengths."""
    mask = padding_mask(lengths, TEXT.shape[1])
    return family.inputs(TEXT * mask, mask)


def assert_greedy_after(prompt, generated, lm):
    """Each token is the likeliest after those before it, and what is heard.

    Without a cache.
    """
    token_ids = generated["token_ids"]
    given = prompt["padding_mask"] == 1
    np.testing.assert_array_equal(token_ids[given], prompt["token_ids"][given])
    inputs = {**prompt, "token_ids": token_ids}
    inputs["padding_mask"] = np.ones_like(token_ids)
    likeliest = to_numpy(lm(inputs)).argmax(axis=-1)
    new = ~given[:, 1:]
    np.testing.assert_array_equal(token_ids[:, 1:][new], likeliest[:, :-1][new])
    assert len(np.unique(token_ids[:, 1:][new])) > 2


# === The graph ===


@every_sound_model
def test_upstream(family):
    """Without a cache, it is upstream's, by the same weights."""
    ours, upstream = family.pair
    for x, y in zip(ours.weights, upstream.weights, strict=True):
        assert x.path == y.path
    full = full_forward(ours, family)
    np.testing.assert_array_equal(full, full_forward(upstream, family))
    # What is heard matters.
    other = full_forward(ours, family, audio_mel=CLIPS[:, ::-1])
    assert np.abs(other - full)[:, 1:].max() > 1e-2
    other = full_forward(ours, family, audio_mel=CLIPS[::-1])
    assert (np.abs(other - full).max(axis=(1, 2)) > 1e-2).all()


@some_sound_model
def test_prefill_and_steps(family):
    backbone, _ = family.pair
    full, end = full_forward(backbone, family), LENGTH
    # All at once; a clip in each of two calls; without either tower in a step.
    cases = [[(0, end)], [(0, 5, slice(1)), (5, end, slice(1, 2))]]
    if not family.sees:
        steps = [(i, i + 1, slice(0)) for i in range(9, end)]
        cases.append([(0, 9), *steps])
    for case in cases:
        parts = [part(family, *x) for x in case]
        cached = cached_forward(backbone, parts, compiled(backbone))
        np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@some_sound_model
def test_parts_of_the_graph(family):
    backbone, _ = family.pair
    full, inputs = full_forward(backbone, family), family.inputs(TOKENS, MASK)
    heard = backbone.encode_audio(
        inputs["audio_mel"], audio_mel_mask=inputs["audio_mel_mask"]
    )
    expected = backbone.audio_encoder(
        ops.convert_to_tensor(inputs["audio_mel"]),
        ops.convert_to_tensor(inputs["audio_mel_mask"] != 0),
    )
    np.testing.assert_array_equal(to_numpy(heard), to_numpy(expected))
    without = dict.fromkeys(["audio_mel", "audio_mel_mask"])
    given = {**without, "audio_embeddings": heard}
    np.testing.assert_allclose(
        full_forward(backbone, family, **given), full, atol=1e-5
    )
    whole = {**part(family, 0, LENGTH), **given}
    cached = cached_forward(backbone, [whole])
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)
    embeddings = backbone.embed(inputs)
    without |= dict.fromkeys(["pixel_values", "pixel_position_ids"])
    given = {k: None for k in without if k in inputs}
    np.testing.assert_allclose(
        full_forward(backbone, family, embeddings=embeddings, **given),
        full,
        atol=1e-5,
    )


@every_sound_model
def test_text_needs_no_sound(family):
    """Nor does one that has images alone need any, or the other way round."""
    backbone, upstream = family.pair
    inputs = family.inputs(TOKENS, MASK)
    sound = [name for name in inputs if name.startswith("audio_")]
    images = [x for x in inputs if x.startswith(("pixel_", "vision_"))]
    for left_out in (sound, images, sound + images):
        kept = {k: x for k, x in inputs.items() if k not in left_out}
        # As upstream's preprocessor says that there are none.
        none = {k: inputs[k] for k in left_out}
        for name in none:
            none[name] = 0 * none[name]
            if not name.endswith("_mask") or name == "audio_mel_mask":
                none[name] = none[name][:, :0]
        full = to_numpy(backbone({**kept, **none}))
        np.testing.assert_array_equal(to_numpy(backbone(kept)), full)
        if left_out is sound:
            expected = to_numpy(upstream({**kept, **none}))
            np.testing.assert_array_equal(full, expected)
    cached = cached_forward(backbone, [{"token_ids": TOKENS}])
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@on_one_backend("what is called is the graph, as it is elsewhere")
@every_sound_model
def test_a_step_calls_no_tower(family, monkeypatch):
    backbone, _ = family.pair
    tower, called = {id(x) for x in backbone.prefill_layers}, []
    for layer in (*backbone.prefill_layers, *backbone.blocks):

        def counted(*args, call=layer.call, layer=layer, **kwargs):
            called.append(id(layer))
            return call(*args, **kwargs)

        monkeypatch.setattr(layer, "call", counted)
    first = {
        **part(family, 0, LENGTH),
        "cache": backbone.make_cache(2, LENGTH + 1),
    }
    _, cache = backbone({**first, "cache_update_index": 0})
    blocks = [id(x) for x in backbone.blocks]
    towers = [backbone.audio_encoder, *[backbone.vision_encoder] * family.sees]
    assert [called.count(id(x)) for x in towers] == [1] * len(towers)
    assert [x for x in called if x not in tower] == blocks
    called.clear()
    step = {"token_ids": TOKENS[:, :1], "cache": cache}
    backbone({**step, "cache_update_index": LENGTH})
    assert called == blocks


# === Generating ===


@some_sound_model
def test_greedy(family):
    lm, upstream = greedy(family), family.lm_pair[1]
    for given in ([LENGTH + 1] * 2, [LENGTH + 1, LENGTH + 3]):
        prompt = prompts(family, given)
        generated = lm.generate(prompt, stop_token_ids=None)
        assert_greedy_after(prompt, generated, lm)
        if keras.config.backend() != "torch":
            continue
        upstream.compile(sampler="greedy")
        expected = upstream.generate(prompt, stop_token_ids=None)
        for name, x in expected.items():
            np.testing.assert_array_equal(
                generated[name], ops.convert_to_numpy(x)
            )


@on_one_backend("a sampler with a loop of its own calls what others call")
@one_sound_model
def test_beams_and_steps_of_upstream(family):
    prompt = prompts(family, [LENGTH + 1, LENGTH + 3])
    expected = greedy(family).generate(prompt, stop_token_ids=None)
    lm = family.task(family.pair[0])
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=1))
    generated = lm.generate(prompt, stop_token_ids=None)
    np.testing.assert_array_equal(generated["token_ids"], expected["token_ids"])
    names = list(inspect.signature(lm.call_with_cache).parameters)
    theirs = inspect.signature(family.lm_pair[1].call_with_cache).parameters
    assert names[: len(theirs)] == list(theirs)
    # By what upstream's takes, too.
    inputs, cache = (
        family.inputs(TOKENS, MASK),
        lm.backbone.make_cache(2, LENGTH),
    )
    given = {
        name: inputs[name]
        for name in theirs
        if name.endswith(("_mask", "_indices")) and name in inputs
    }
    del given["padding_mask"]
    heard, seen = (
        lm.backbone.encode_audio(
            inputs["audio_mel"], audio_mel_mask=inputs["audio_mel_mask"]
        ),
        lm.backbone.encode_images(
            inputs["pixel_values"],
            pixel_position_ids=inputs["pixel_position_ids"],
        ),
    )
    given |= {"audio_embeddings": heard, "img_embeddings": seen}
    logits, hidden_states, _ = lm.call_with_cache(TOKENS, cache, 0, **given)
    full = full_forward(lm.backbone, family)
    np.testing.assert_allclose(to_numpy(hidden_states), full, atol=1e-4)
    np.testing.assert_allclose(
        to_numpy(logits), to_numpy(lm(inputs)), atol=1e-3
    )


@functools.cache
def with_text(family):
    """Our task and upstream's, with a preprocessor, and compiled."""
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    backbone = family.backbone(vocabulary_size=size)
    lm = family.task(backbone, preprocessor)
    upstream = family.upstream_task(
        family.upstream_backbone(backbone, vocabulary_size=size), preprocessor
    )
    for x in (lm, upstream):
        x.compile(sampler="greedy", **XLA)
    return lm, upstream


def batches(family):
    """Prompts with sound that a user may have."""
    hear = family.mark_of_sound
    text = f"the {hear} fox"
    yield {"prompts": text, "audio": WAVES[0]}
    # A row with a shorter clip, and one without any.
    yield {
        "prompts": [f"{hear} what is", "the quick fox", f"the {hear} dog"],
        "audio": [WAVES[0], WAVES[0][:0], WAVES[1, :1500]],
    }
    if family.sees:
        image = (255 * IMAGES[0]).astype("float32")
        yield {
            "prompts": f"{family.mark} and {hear} fox",
            "audio": WAVES[1],
            "images": image,
        }


@some_sound_model
def test_text(family):
    lm, upstream = with_text(family)
    answers = []
    for batch in batches(family):
        generated = lm.generate(dict(batch))
        answers += [generated] if isinstance(generated, str) else generated
        if keras.config.backend() == "torch":
            assert generated == upstream.generate(dict(batch))
            continue
        break  # Each is compiled anew.
    if keras.config.backend() != "torch":
        return
    # What is heard decides what is said.
    hear = family.mark_of_sound
    texts = [f"the {hear} fox", hear, f"{hear} what is"]
    one, other = (
        lm.generate({"prompts": texts, "audio": [wave] * 3}) for wave in WAVES
    )
    assert one[0] == answers[0] and one != other
    # In whatever form it comes.
    as_list = {"prompts": texts[0], "audio": [list(WAVES[1])]}
    assert lm.generate(as_list) == other[0]
    both = lm.generate({"prompts": texts[:1] * 2, "audio": WAVES})
    assert both == [one[0], other[0]]
    # Without sound, it is a model like any other.
    quick = lm.generate("the quick fox")
    for audio in ({}, {"audio": None}, {"audio": [None]}):
        batch = {"prompts": ["the quick fox"], **audio}
        assert lm.generate(batch) == [quick]
    assert answers[2] == quick
    shown = "".join(lm.stream("the quick fox", 4, stop_token_ids=None))
    assert shown and shown in quick


@on_one_backend("what Keras does with a gradient is Keras' to test")
@every_sound_model
def test_training(family):
    """One step of gradient descent through the preprocessor is upstream's."""
    preprocessor = family.preprocessor(sequence_length=24)
    size = preprocessor.tokenizer.vocabulary_size()
    ours = family.task(family.backbone(vocabulary_size=size), preprocessor)
    theirs = family.upstream_task(
        family.upstream_backbone(ours.backbone, vocabulary_size=size),
        preprocessor,
    )
    if not family.sees:
        # Upstream's takes what says that there are no images for something
        # else.
        theirs = ours
    data = {
        "prompts": np.array([f"the {family.mark_of_sound} fox"] * 2),
        "responses": np.array(["the dog", "what is"]),
        "audio": WAVES,
    }
    before = [to_numpy(x.value) for x in ours.weights]
    for lm in dict.fromkeys([ours, theirs]):
        lm.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        lm.fit(data, batch_size=2, epochs=1, verbose=0)
    moved = set()
    for x, y, old in zip(ours.weights, theirs.weights, before, strict=True):
        new = to_numpy(x.value)
        np.testing.assert_allclose(
            new, to_numpy(y.value), atol=1e-5, err_msg=x.path
        )
        if (new != old).any():
            moved.add(x.path.split("/")[0])
    assert any("audio" in path or "conformer" in path for path in moved), moved


# === Files and surgery ===


@one_sound_model
def test_presets(family, tmp_path):
    """Each reads what the other one saved."""
    lm, upstream = with_text(family)
    inputs = family.inputs(TOKENS % 40, MASK)
    full = to_numpy(lm.backbone(inputs))
    for saved, cls in (
        (lm, family.upstream("CausalLM")),
        (upstream, keras_nlp_cache.models.CausalLM),
    ):
        path = str(tmp_path / cls.__module__)
        saved.save_to_preset(path)
        loaded = cls.from_preset(path)
        assert type(loaded.backbone) is not type(saved.backbone)
        np.testing.assert_allclose(
            to_numpy(loaded.backbone(inputs)), full, atol=1e-5
        )


def in_all_of(backbone):
    """Edits by what they change: a tower, the text, and the decoder."""
    layer = keras.layers.Rescaling(-3.0)
    for where in (
        backbone.audio_encoder.name,
        "joined_embeddings",
        "decoder.1",
    ):
        yield lambda lm, where=where: surgery.insert_after(lm, where, layer)
    yield lambda lm: surgery.remove(lm, "decoder.1")


@one_sound_model
def test_edits_show_in_generation(family, tmp_path):
    lm, prompt = greedy(family), prompts(family, [LENGTH + 1, LENGTH + 3])
    before = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    edits = list(in_all_of(lm.backbone))
    if keras.config.backend() != "torch":
        edits = edits[:1]  # Each is compiled anew.
    for edit in edits:
        edited = edit(lm)
        edited.compile(sampler="greedy", **XLA)
        after = edited.generate(prompt, stop_token_ids=None)
        assert_greedy_after(prompt, after, edited)
        assert (after["token_ids"] != before).any()
    edited.backbone.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras")
    np.testing.assert_allclose(
        full_forward(loaded, family),
        full_forward(edited.backbone, family),
        atol=1e-5,
    )
    cached = cached_forward(loaded, [part(family, 0, LENGTH)])
    np.testing.assert_allclose(
        cached, full_forward(loaded, family), atol=1e-4, rtol=1e-4
    )


@on_one_backend("what is refused does not depend on one")
@one_sound_model
def test_edits_that_text_would_not_go_through(family):
    backbone, _ = family.pair
    for name in (
        "audio_encoder_output",
        "image_encoder_output",
        "joined_images",
    ):
        with pytest.raises(ValueError, match="leaves 'image_encoder_output'"):
            surgery.remove(backbone, name)
    join = keras.layers.Rescaling(2.0)
    with pytest.raises(ValueError, match="after 'joined_embeddings'"):
        surgery.insert_after(backbone, "audio_interleave_embeddings", join)


@on_one_backend("what is a user's to do is Keras' to do")
@one_sound_model
def test_quantized(family):
    lm, prompt = family.task(family.backbone()), prompts(family, [15, 16])
    lm.compile(sampler="greedy")
    lm.quantize("int8")
    generated = lm.generate(prompt, stop_token_ids=None)
    given = prompt["padding_mask"] == 1
    np.testing.assert_array_equal(
        generated["token_ids"][given], prompt["token_ids"][given]
    )


# === Bad input ===


def bad_calls(backbone, inputs):
    """Pairs of what a backbone refuses and how it says so."""
    mel, mask = inputs["audio_mel"], inputs["audio_mel_mask"]
    places = inputs["audio_indices"]
    heard = to_numpy(backbone.encode_audio(mel, audio_mel_mask=mask))
    none = dict.fromkeys(["audio_mel", "audio_mel_mask"])
    many = np.array([[1, 2, 3, 0, 6, 7, 8, 9], [2, 3, 4, 6, 7, 0, 0, 0]])
    yield {"audio_mel": mel[:, 0]}, r"clips, frames, mel_bins=8.*\(2, 21, 8\)"
    yield {"audio_mel": mel[..., :7]}, r"mel_bins=8\).*\(2, 2, 21, 7\)"
    yield {"audio_mel_mask": mask[:, 0]}, r"clips, frames\).*\(2, 21\)"
    yield (
        {"audio_mel_mask": mask[..., :-1]},
        r"`audio_mel_mask` \(batch, clips, frames\).*21, 8\) and .*2, 20\)",
    )
    yield (
        {"audio_mel_mask": None},
        r"`audio_mel` and `audio_mel_mask`, or neither.*21, 8\) and none",
    )
    one_row = {"audio_mel": mel[:1], "audio_mel_mask": mask[:1]}
    yield one_row, r"`audio_mel` to have one row.*\(2, 14\).*\(1, 2, 21, 8\)"
    yield (
        {**none, "audio_indices": None},
        "`audio_mel` for the tokens that `audio_mask`.*clips. Received: none",
    )
    yield (
        {"audio_indices": None, "audio_mask": None},
        "with clips, to say.*no audio_indices and no audio_mask",
    )
    yield (
        {"audio_mask": 0 * inputs["audio_mask"], "audio_indices": 0 * places},
        "mask of zeros. Put a placeholder for each clip into a prompt",
    )
    yield {"audio_mask": inputs["audio_mask"][:, :3]}, "of length 14.*3"
    yield {"audio_indices": places + 1}, r"in row 0: \[2, 3, 4, 7, 8, 9\]"
    yield {"audio_indices": places[:, :5]}, r"2 clips, at most 6.*\(2, 5\)"
    yield (
        {"audio_indices": many, "audio_mask": _mask_of(many)},
        r"side by side, and 0 .*row 1: \[2, 3, 4, 6, 7, 0, 0, 0\]",
    )
    yield (
        {"audio_embeddings": heard},
        "computed of some before. Received: audio_mel and audio_embeddings",
    )
    yield (
        {**none, "audio_embeddings": heard[..., 1:]},
        r"`audio_embeddings`.*hidden_dim=32.*31\)",
    )


def _mask_of(places):
    mask = np.zeros_like(TOKENS)
    for row, of_row in zip(mask, places):
        row[of_row[of_row > 0]] = 1
    return mask


@on_one_backend("what is refused does not depend on one")
@every_sound_model
def test_bad_calls(family):
    backbone, _ = family.pair
    inputs = family.inputs(TOKENS, MASK)
    for changes, message in bad_calls(backbone, inputs):
        with pytest.raises(ValueError, match=message):
            backbone({**inputs, **changes})
    with pytest.raises(ValueError, match="`audio_mel` and `audio_mel_mask`"):
        backbone.encode_audio(CLIPS)
    plain = keras_nlp_cache.models.Gemma4Backbone(
        **{k: x for k, x in family.config if k != "audio_encoder"}
    )
    with pytest.raises(ValueError, match="a model that reads sound"):
        plain.encode_audio(CLIPS)


@on_one_backend("what is refused does not depend on one")
@one_sound_model
def test_bad_prompts(family):
    lm = greedy(family)
    prompt = prompts(family, [LENGTH + 1, 8])
    with pytest.raises(ValueError, match="prompt 1, which ends with.* clip"):
        short = {k: x for k, x in prompt.items() if "vision" not in k}
        short |= dict.fromkeys(["pixel_values", "pixel_position_ids"])
        lm.generate(short, stop_token_ids=None)
    prompt = prompts(family, [LENGTH + 1] * 2)
    for changes, message in (
        ({"audio_mel": None}, "`audio_mel` with `audio_mel_mask`.*no clips"),
        (
            {"audio_mel_mask": np.ones_like(prompt["audio_mel_mask"])},
            "3 places for the 6 tokens of clip 0 of prompt 0. Raise `max_",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate({**prompt, **changes}, stop_token_ids=None)
    lm, _ = with_text(family)
    hear = f"the {family.mark_of_sound}fox"
    for bad, message in (
        ({"prompts": hear}, r"\[1\] of them, for \[0\] clips"),
        (hear, r"\[1\] of them, for \[0\] clips"),
        ({"prompts": hear * 2, "audio": WAVES[0]}, r"\[2\] of them, for \[1\]"),
        (
            {"prompts": [hear, "the fox"], "audio": WAVES},
            r"\[1, 0\] of them, for \[1, 1\] clips",
        ),
        ({"prompts": hear, "audio": WAVES}, r"\(samples,\).*\(2, 3000\)"),
        ({"prompts": [hear], "audio": WAVES}, r"each of 1 `prompts`.*\(2, 30"),
        ({"prompts": hear, "audio": np.ones(9, int)}, "floating numbers"),
        ({"prompts": hear, "audio": "a.wav"}, "floating numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate(bad)
    long = {"prompts": hear, "audio": WAVES[0]}
    with pytest.raises(ValueError, match="ends with one of a clip, at 7"):
        lm.generate(long, max_length=8)
    with pytest.raises(ValueError, match="stands for a clip.*Pass `audio` to"):
        lm.start_session().send(hear)
    with pytest.raises(ValueError, match="stands for a clip.*Pass `audio` to"):
        list(lm.generate_many([hear], 2))
    plain = keras_nlp_cache.models.Gemma4Backbone(
        **{k: x for k, x in family.config if k != "audio_encoder"}
    )
    plain = family.task(plain)
    with pytest.raises(ValueError, match="no `audio_mel` for a backbone wit"):
        plain.generate(prompt, stop_token_ids=None)
