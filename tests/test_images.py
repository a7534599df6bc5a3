"""A decoder reads images: once, with all that they are seen by, or cached."""

import copy
import functools
import re

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import device
from keras_nlp_cache import surgery
from tests.edits import EDITS
from tests.families import compiled
from tests.families import every_image_in_text
from tests.families import every_image_model
from tests.families import IMAGE_MODELS
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import XLA

LENGTH = 16
TOKENS = random_tokens(2, 10)
MASK = np.ones_like(TOKENS)
# Of what is not part of the text, nobody says anything in a decode step.
TEXT = ("token_ids", "padding_mask")
PALI_GEMMA = IMAGE_MODELS[0]
(BLIP2,) = (x for x in IMAGE_MODELS if x.name == "blip2")
PALI_GEMMA_ALONE = pytest.mark.parametrize(
    "family", [pytest.param(PALI_GEMMA, id=PALI_GEMMA.name)]
)


def instead(family, **given):
    """Inputs in the place of images."""
    names = family.name_of_images, *family.with_images
    return {**dict.fromkeys(names), **given}


def seen_by(backbone, inputs):
    """What the tower makes of the images among inputs."""
    roles = backbone.roles
    beside = {name: inputs[name] for name in roles.images.with_given}
    given = inputs[roles.images.given]
    return to_numpy(backbone.encode_images(given, **beside))


@functools.cache
def greedy(family):
    """A task over `family.pair`, which stays compiled."""
    lm = family.task(family.pair[0])
    lm.compile(sampler="greedy", **XLA)
    return lm


def prompts(family, given):
    """What a task is called with, for prompts of some lengths."""
    mask = padding_mask(given, LENGTH)
    inputs = family.inputs(random_tokens(2, LENGTH, seed=1) * mask, mask)
    inputs.pop("response_mask", None)
    return inputs


def full_forward(backbone, family, **changes):
    """What becomes of images and text without a cache."""
    outputs = backbone({**family.inputs(TOKENS, MASK), **changes})
    return to_numpy(outputs[0] if isinstance(outputs, tuple) else outputs)


def first_call(family, count, inputs=None):
    """The inputs that read images and the first tokens."""
    inputs = dict(inputs or family.inputs(TOKENS, MASK))
    # Where tokens stand, a cache knows.
    for name in ("padding_mask", "position_ids"):
        inputs.pop(name, None)
    for name, x in inputs.items():
        if getattr(x, "shape", ())[1:] == TOKENS.shape[1:]:
            inputs[name] = x[:, :count]
    return inputs


def cached_forward(backbone, family, sizes=(8, 1, 1), call=None, **changes):
    """The same through a cache, of which only the first call reads images."""
    before = backbone.before
    cache, index = backbone.make_cache(2, before + TOKENS.shape[1]), 0
    found = []
    for size in sizes:
        now = {"token_ids": TOKENS[:, index : index + size]}
        if index == 0:
            now = {**first_call(family, size), **changes}
        slot = index and before + index
        now |= {"cache": cache, "cache_update_index": slot}
        output, cache, *_ = (call or backbone)(now)
        found.append(to_numpy(output))
        index += size
    return np.concatenate(found, axis=1)


def assert_sound(backbone, family):
    """The graph is the same with its cache. Returns what it returns."""
    full = full_forward(backbone, family)
    np.testing.assert_allclose(
        cached_forward(backbone, family), full, atol=1e-4, rtol=1e-3
    )
    return full


def assert_greedy_after(family, prompt, generated, lm):
    """Each token is the likeliest after an image and those before it.

    Each row alone, all at once and without a cache.
    """
    token_ids = generated["token_ids"]
    given = prompt["padding_mask"] == 1
    np.testing.assert_array_equal(token_ids[given], prompt["token_ids"][given])
    for row in range(len(token_ids)):
        inputs = {k: x[row : row + 1] for k, x in prompt.items()}
        inputs["token_ids"] = token_ids[row : row + 1]
        inputs["padding_mask"] = np.ones_like(inputs["token_ids"])
        if family.prefix == "PaliGemma":
            inputs["response_mask"] = 1 - prompt["padding_mask"][row : row + 1]
        likeliest = to_numpy(lm(inputs))[0].argmax(axis=-1)
        new = ~given[row, 1:]
        np.testing.assert_array_equal(
            token_ids[row, 1:][new], likeliest[:-1][new]
        )


# === The graph ===


@every_image_model
@pytest.mark.parametrize("sizes", [(10,), (8, 1, 1), (8, 2)])
def test_prefill_and_steps(family, sizes):
    backbone, _ = family.pair
    full = full_forward(backbone, family)
    cached = cached_forward(backbone, family, sizes, call=compiled(backbone))
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)
    # What it sees matters, and so does what follows in a span.
    images = family.inputs(TOKENS, MASK)[family.name_of_images]
    others = {family.name_of_images: images[::-1]}
    other = full_forward(backbone, family, **others)
    assert np.abs(other - full).max() > 1e-2


@pytest.mark.parametrize(
    "family",
    # What an image became, others read as if it were text.
    [pytest.param(x, id=x.name) for x in IMAGE_MODELS if x.sees_ahead],
)
def test_what_follows_in_a_span_is_seen(family):
    """And what follows in a text is not."""
    backbone, _ = family.pair
    full = full_forward(backbone, family)
    embeddings = to_numpy(backbone.embed(family.inputs(TOKENS, MASK)))
    # The first and the last token of a span, of each row.
    spans = ((1, 4), (2, 5))
    if family.prefix == "PaliGemma":
        spans = ((0, backbone.before + 7),) * 2
    # To be added to what they are, and not to what rounding leaves of that.
    unchanged = embeddings.copy()
    for row, (_, last) in enumerate(spans):
        embeddings[row, last] += 1.0
    seen = changes(backbone, family, embeddings, full)
    for row, (first, last) in enumerate(spans):
        assert (seen[row, first : last + 1] > 1e-4).all()
        assert (seen[row, :first] < 1e-5).all()
    embeddings = unchanged
    embeddings[:, -1] += 1.0
    seen = changes(backbone, family, embeddings, full)
    assert (seen[:, :-1] < 1e-5).all() and (seen[:, -1] > 1e-2).all()


def changes(backbone, family, embeddings, full):
    """How much other embeddings change of each hidden state."""
    other = full_forward(
        backbone, family, **instead(family, embeddings=embeddings)
    )
    return np.abs(other - full).max(axis=-1)


@every_image_model
def test_parts_of_the_graph(family):
    backbone, _ = family.pair
    full = full_forward(backbone, family)
    inputs = family.inputs(TOKENS, MASK)
    seen, expected = seen_by(backbone, inputs), inputs[family.name_of_images]
    if family.with_images:
        names = family.name_of_images, *family.with_images
        expected = {name: inputs[name] for name in names}
    for tower in backbone.towers(backbone.roles.images):
        expected = tower(expected)
    np.testing.assert_array_equal(seen, to_numpy(expected))
    embeddings = backbone.embed(family.inputs(TOKENS, MASK))
    for given in ({"img_embeddings": seen}, {"embeddings": embeddings}):
        np.testing.assert_allclose(
            full_forward(backbone, family, **instead(family, **given)),
            full,
            atol=1e-5,
        )
    cached = cached_forward(
        backbone, family, **instead(family, img_embeddings=seen)
    )
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@every_image_model
def test_rows_stand_at_places_of_their_own(family):
    backbone, _ = family.pair
    before, index = backbone.before, np.array([8, 9])
    call = compiled(backbone)
    _, cache = call(
        {
            **first_call(family, 10),
            "cache": backbone.make_cache(2, before + LENGTH),
            "cache_update_index": 0,
        }
    )
    output, _ = call(
        {
            "token_ids": TOKENS[[0, 1], index][:, None],
            "cache": cache,
            "cache_update_index": before + index,
        }
    )
    np.testing.assert_allclose(
        to_numpy(output)[:, 0],
        full_forward(backbone, family)[[0, 1], before + index],
        atol=1e-4,
        rtol=1e-4,
    )


@every_image_model
def test_inputs_that_all_backbones_take(family):
    """Positions and a mask that say what is so anyway change nothing."""
    backbone, _ = family.pair
    mask = padding_mask([10, 9], 10)
    inputs = family.inputs(TOKENS, mask)
    full = to_numpy(backbone(inputs))
    inputs.pop("position_ids", None)
    length = full.shape[1]
    positions = np.broadcast_to(np.arange(length), (2, length))
    given = to_numpy(
        backbone(
            {
                **inputs,
                "attention_mask": np.ones((2, length, length), bool),
                "token_positions": positions,
            }
        )
    )
    real = np.pad(mask, ((0, 0), (backbone.before, 0)), constant_values=1) == 1
    np.testing.assert_allclose(given[real], full[real], atol=1e-4, rtol=1e-4)


# === Generating ===


@every_image_model
def test_greedy(family):
    prompt = prompts(family, [8, 8])
    if family.decodes_wrong:
        lm = greedy(family)
        generated = lm.generate(prompt, stop_token_ids=None)
        assert_greedy_after(family, prompt, generated, lm)
    family = family.decoded_as_read
    lm, upstream = greedy(family), family.lm_pair[1]
    upstream.compile(sampler="greedy")
    generated = lm.generate(prompt, stop_token_ids=None)
    expected = upstream.generate(prompt, stop_token_ids=None)
    for name, x in expected.items():
        np.testing.assert_array_equal(generated[name], ops.convert_to_numpy(x))
    assert len(np.unique(generated["token_ids"][:, 8:])) > 3
    assert_greedy_after(family, prompt, generated, lm)
    # They end with a stop token each.
    stop = int(generated["token_ids"][0, 11])
    ended, expected = (
        x.generate(prompt, stop_token_ids=[stop]) for x in (lm, upstream)
    )
    mask = ops.convert_to_numpy(expected["padding_mask"])
    np.testing.assert_array_equal(ended["padding_mask"], mask)


# Where each is compiled, the one that leaves layers without a window alone.
POLICIES = ("rotating",)
if keras.config.backend() == "torch":
    POLICIES = ("rotating", "full")


@every_image_model
def test_prompts_of_different_lengths(family):
    """Rows together are what they are alone, and without a cache."""
    lm, _ = family.lm_pair
    prompt = prompts(family, [8, 11])
    # What follows an image is read in pieces, as few as there may be.
    device.set_constants(compiled_chunk=2, eager_chunk=2)
    try:
        for policy in POLICIES:
            lm.compile(sampler="greedy", cache_policy=policy)
            generated = lm.generate(prompt, stop_token_ids=None)
            assert_greedy_after(family, prompt, generated, lm)
    finally:
        device.set_constants()


@pytest.mark.parametrize(
    "length, chunk, expected",
    [
        (9, 1, 6),
        (9, 4, 8),
        # In chunks of 100 from there, more than 256 slots would be written.
        (250, 100, 256),
    ],
)
def test_how_much_is_read_with_images(length, chunk, expected):
    family = IMAGE_MODELS[1]
    lm, _ = family.lm_pair
    inputs = family.inputs(TOKENS, MASK)
    source = {k: x for k, x in inputs.items() if k not in TEXT}
    fitted = lm.fitted_source(source, length, 256, chunk)
    mask = fitted["vision_mask"]
    assert lm.read_with(fitted) == mask.shape[1] == expected
    seen = min(expected, mask.shape[1], 10)
    np.testing.assert_array_equal(
        mask[:, :seen], source["vision_mask"][:, :seen]
    )
    assert not mask[:, seen:].any()
    none = {**source, "vision_mask": 0 * source["vision_mask"]}
    assert lm.fitted_source(none, length, 256, chunk) == {}
    assert lm.read_with({}) == 0


@every_image_model
def test_beams(family):
    lm, upstream = family.lm_pair
    beams = 2
    if family.mark:
        # Upstream's has no mask for each beam.
        beams, upstream = 1, lm
    prompt = prompts(family, [8, 8])
    for x in (lm, upstream):
        x.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=beams))
    generated = lm.generate(prompt, stop_token_ids=None)
    if upstream is lm:
        upstream = greedy(family)
    expected = upstream.generate(prompt, stop_token_ids=None)
    np.testing.assert_array_equal(
        generated["token_ids"], ops.convert_to_numpy(expected["token_ids"])
    )


@on_one_backend("prompts are grouped before a backend sees them")
@every_image_model
def test_beams_of_prompts_of_different_lengths(family):
    lm, _ = family.lm_pair
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    prompt = prompts(family, [8, 11])
    generated = lm.generate(prompt, stop_token_ids=None)
    for row in range(2):
        alone = {name: x[row : row + 1] for name, x in prompt.items()}
        np.testing.assert_array_equal(
            lm.generate(alone, stop_token_ids=None)["token_ids"][0],
            generated["token_ids"][row],
        )


@PALI_GEMMA_ALONE
def test_responses_are_read_as_in_training(family):
    lm = greedy(family)
    prompt = prompts(family, [8, 10])
    response = padding_mask([8, 10], LENGTH) - padding_mask([5, 6], LENGTH)
    generated = lm.generate(
        {**prompt, "response_mask": response}, stop_token_ids=None
    )
    plain = lm.generate(prompt, stop_token_ids=None)
    assert (plain["token_ids"] != generated["token_ids"]).any()
    token_ids = generated["token_ids"]
    likeliest = to_numpy(
        lm(
            {
                **prompt,
                "token_ids": token_ids,
                "padding_mask": np.ones_like(token_ids),
                "response_mask": 1 - padding_mask([5, 6], LENGTH),
            }
        )
    ).argmax(axis=-1)
    new = prompt["padding_mask"][:, 1:] == 0
    np.testing.assert_array_equal(token_ids[:, 1:][new], likeliest[:, :-1][new])


@on_one_backend("calls are counted")
@every_image_model
def test_images_are_seen_once(family, monkeypatch):
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy", run_eagerly=True)
    once = family.of_images_alone(lm.backbone)
    calls = []
    for part in (*once, *lm.backbone.blocks):
        call = part.call

        def counted(x, *args, call=call, part=part, **kwargs):
            calls.append((part, len(keras.tree.flatten(x)[0])))
            return call(x, *args, **kwargs)

        monkeypatch.setattr(part, "call", counted)
    lm.generate(prompts(family, [8, 11]), stop_token_ids=None)
    for layer in once:
        assert sum(count for part, count in calls if part is layer) == 2
    for block in lm.backbone.blocks:
        # One step at least for each token of the row that is shorter.
        count = len([part for part, _ in calls if part is block])
        assert count >= LENGTH - 8


def run(backbone, inputs):
    """Calls a backbone, for what it calls."""
    if keras.config.backend() != "jax":
        backbone(inputs)
        return
    import jax

    # Nothing is compiled.
    jax.eval_shape(lambda: backbone(inputs))


@every_image_model
def test_a_step_calls_nothing_of_a_tower(family, monkeypatch):
    backbone, _ = family.pair
    # Parts of a tower may have the names of blocks.
    tower, called = {id(x) for x in backbone.prefill_layers}, []
    for part in (*backbone.prefill_layers, *backbone.blocks):
        if not part.built:
            continue

        def counted(*args, call=part.call, part=part, **kwargs):
            called.append(id(part))
            return call(*args, **kwargs)

        monkeypatch.setattr(part, "call", counted)
    cache = backbone.make_cache(2, LENGTH)
    run(
        backbone,
        {**first_call(family, 8), "cache": cache, "cache_update_index": 0},
    )
    blocks = [id(x) for x in backbone.blocks]
    assert len(tower.intersection(called)) > 8
    assert [x for x in called if x not in tower] == blocks
    called.clear()
    step = {"token_ids": TOKENS[:, 8:9], "cache": cache}
    run(backbone, {**step, "cache_update_index": backbone.before + 8})
    assert called == blocks


@on_one_backend("operators are counted")
@every_image_model
def test_a_step_is_that_of_a_model_without_images(family):
    lm = family.task(family.pair[0])
    lm.compile(sampler="greedy")
    lm.generate(prompts(family, [8, 8]), stop_token_ids=None)
    ((_, step),) = lm.generation_loop._captured.values()
    counts = [len(list(step.graph.nodes))]
    text_lm = family.without_images()
    text_lm.compile(sampler="greedy")
    text = random_tokens(2, LENGTH) % 90 + 1, padding_mask([8, 8], LENGTH)
    text_lm.generate(dict(zip(TEXT, text)), stop_token_ids=None)
    ((_, step),) = text_lm.generation_loop._captured.values()
    counts.append(len(list(step.graph.nodes)))
    assert counts[0] == counts[1]


@every_image_model
def test_text(family):
    family = family.decoded_as_read
    preprocessor = family.preprocessor(sequence_length=24)
    size = preprocessor.tokenizer.vocabulary_size()
    backbone = family.backbone(vocabulary_size=size)
    lm = family.task(backbone, preprocessor)
    upstream = family.upstream_task(
        family.upstream_backbone(backbone, vocabulary_size=size), preprocessor
    )
    for x in (lm, upstream):
        x.compile(sampler="greedy")
    # Larger than the tower sees.
    pictures = np.repeat(255 * IMAGES, 2, axis=1)
    name = family.name_of_text
    for prompt in (
        {"images": pictures[0], name: f"{family.mark}the quick fox"},
        {"images": pictures, name: [f"the {family.mark}fox"] * 2},
    ):
        before = copy.deepcopy(prompt)
        generated = lm.generate(prompt)
        np.testing.assert_array_equal(before["images"], prompt["images"])
        assert generated == by_upstream(family, upstream, prompt)
        options = dict(max_length=20, strip_prompt=True)
        assert lm.generate(prompt, **options) == by_upstream(
            family, upstream, prompt, **options
        )


def by_upstream(family, upstream, prompt, **options):
    """What a task of upstream's generates, as for each prompt alone."""
    texts = prompt[family.name_of_text]
    if isinstance(texts, str) or not family.mixes_prompts:
        return upstream.generate(dict(prompt), **options)
    return [
        by_upstream(
            family,
            upstream,
            {"images": image, family.name_of_text: text},
            **options,
        )
        for image, text in zip(prompt["images"], texts)
    ]


@on_one_backend("what is called is recorded")
@every_image_model
def test_what_a_subclass_says_is_called(family):
    called = []

    class Mine(family.ours("CausalLM")):
        def call_with_cache(self, *args, **kwargs):
            called.append("step")
            return super().call_with_cache(*args, **kwargs)

    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 11])
    expected = lm.generate(prompt, stop_token_ids=None)
    mine = Mine(backbone=lm.backbone, preprocessor=None)
    mine.compile(sampler="greedy")
    generated = mine.generate(prompt, stop_token_ids=None)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(generated["token_ids"]), expected["token_ids"]
    )
    assert len(called) > 8


@every_image_model
def test_training(family):
    """One step of gradient descent is upstream's."""
    ours = family.task(family.backbone())
    theirs = family.upstream_task(family.upstream_backbone(ours.backbone))
    inputs = family.inputs(TOKENS, padding_mask([10, 8], 10))
    targets = random_tokens(2, 10, seed=2)
    for lm in (ours, theirs):
        lm.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        lm.fit(inputs, targets, batch_size=2, epochs=1, verbose=0)
    for x, y in zip(ours.weights, theirs.weights, strict=True):
        if any(part in x.path for part in family.constants):
            continue
        np.testing.assert_allclose(
            to_numpy(x.value), to_numpy(y.value), atol=1e-5, err_msg=x.path
        )


# === Surgery ===


@functools.cache
def original(family):
    """A task of three blocks, made once, and not changed."""
    return family.task(family.backbone(num_layers=3, **family.for_edits))


# Where each edit is compiled, those that call a block in another way.
TRIED = EDITS
if keras.config.backend() != "torch":
    TRIED = ("insert_a_block", "add_attention_sink")


@every_image_model
@pytest.mark.parametrize("edit", TRIED)
def test_edits(family, edit, tmp_path):
    backbone = original(family).backbone
    before = full_forward(backbone, family)
    edited = EDITS[edit].apply(backbone)
    after = assert_sound(edited, family)
    assert (np.abs(after - before).max() > 1e-3) == (edit != "tap")
    assert len(edited.blocks) == EDITS[edit].caches
    np.testing.assert_array_equal(full_forward(backbone, family), before)
    edited.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras")
    np.testing.assert_allclose(full_forward(loaded, family), after, atol=1e-5)


SAMPLERS = ("greedy", keras_hub.samplers.BeamSampler(num_beams=1))


def places_to_edit(backbone):
    """Where, and with which sampler. Each is compiled anew."""
    tower = getattr(backbone, backbone.roles.images.tower).name
    if keras.config.backend() != "torch":
        return [(tower, SAMPLERS[0])]
    places = (tower, "joined_embeddings", "decoder.1")
    return [(where, sampler) for where in places for sampler in SAMPLERS]


@every_image_model
def test_edits_show_in_generation(family):
    lm, prompt = greedy(family), prompts(family, [8, 11])
    before = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    for where, sampler in places_to_edit(lm.backbone):
        edited = surgery.insert_after(lm, where, keras.layers.Rescaling(-3.0))
        edited.compile(sampler=sampler)
        after = edited.generate(prompt, stop_token_ids=None)
        assert_greedy_after(family, prompt, after, edited)
        assert (after["token_ids"] != before).any(), where


@on_one_backend("what is refused does not depend on one")
@every_image_model
def test_edits_that_text_would_not_go_through(family):
    backbone, _ = family.pair
    join = backbone.cuts.joined._keras_history.operation.name
    with pytest.raises(ValueError, match="after 'joined_embeddings'"):
        surgery.insert_after(backbone, join, keras.layers.Rescaling(2.0))
    with pytest.raises(ValueError, match="leaves 'image_encoder_output'"):
        surgery.remove(backbone, "image_encoder_output")


# === Bad input ===


def bad_calls(backbone, family):
    """Pairs of what a backbone refuses and how it says so."""
    inputs = family.inputs(TOKENS, MASK)
    text = {"token_ids": TOKENS}
    before = backbone.before
    cached = {
        "cache": backbone.make_cache(2, before + 13),
        "cache_update_index": 0,
    }
    first = first_call(family, 10)
    name = family.name_of_images
    images, seen = inputs[name], seen_by(backbone, inputs)
    wrong = images[..., :8, :], "width=16.*8, 3"
    if family.with_images:
        wrong = images[..., :-1], r"patches, 48\).*1, 16, 47\)"
    yield {**inputs, name: wrong[0]}, rf"`{name}`.*{wrong[1]}"
    one_row = {x: inputs[x][:1] for x in (name, *family.with_images)}
    yield {**inputs, **one_row}, rf"`{name}`.*row.*\(2, 10\)"
    yield (
        {**inputs, "img_embeddings": seen},
        f"computed of some before. Received: {name} and img_embeddings",
    )
    yield (
        {**inputs, **instead(family, img_embeddings=seen[..., :-1])},
        r"`img_embeddings`.*hidden_dim=32.*4, 31\)",
    )
    yield (
        {**inputs, **instead(family, embeddings=np.zeros((2, 3, 32)))},
        rf"`embeddings` of length {before + 10}, .*\(2, 3, 32\)",
    )
    for name in backbone.roles.masks:
        short = {**inputs, name: MASK[:, :3]}
        yield short, rf"`{name}` of length 10.*\(2, 3\)"
    yield (
        {**first, **cached, "cache_update_index": 3 if before else 4},
        rf"to be 0 with images.* first {before} slots.*Received: 3"
        if before
        else "stay within the 13 slots",
    )
    if family.mark:
        yield from bad_places(backbone, family, inputs, cached, seen)
    if family.prefix == "PaliGemma":
        yield text, r"`images` of shape \(2, 16, 16, 3\).*no cache"
        yield (
            {**inputs, "images": None, "img_embeddings": seen[[0, 1, 1]]},
            r"`img_embeddings`.*one row.*\(2, 10\).*\(3, 4, 32\)",
        )
        yield (
            {**text, **cached, "cache_update_index": 0},
            r"first call with a `cache`.*first 4 slots.*\(2, 10\)",
        )
        later = {"token_ids": TOKENS[:, :1], "response_mask": MASK[:, :1]}
        yield (
            {**later, **cached, "cache_update_index": 4},
            r"`response_mask` in the call that reads an image.*\(2, 1\)",
        )


def bad_places(backbone, family, inputs, cached, seen):
    """Those of where images stand in a text."""
    name, text = family.name_of_images, {"token_ids": TOKENS}
    mask, indices = inputs["vision_mask"], inputs["vision_indices"]
    yield (
        {**text, "vision_mask": mask},
        rf"Expected `{name}` for .*\(2, 10\).*none, for 8 such tokens",
    )
    images = {x: inputs[x] for x in (name, *family.with_images)}
    shape = ", ".join(map(str, images[name].shape))
    missing = (
        rf"`{name}` of shape \({shape}\), and no vision_indices "
        "and no vision_mask"
    )
    if backbone.roles.placed_by_tokens:
        missing = "say where images are.*Put a placeholder"
        yield {**inputs, **text}, r"`image_token_id`.*not 0 for tokens with"
        many = np.full_like(TOKENS, backbone.image_token_id)
        yield {**images, "token_ids": many}, "most 4 tokens.*Received: 10, by"
    yield {**text, **images}, missing
    for x in family.with_images:
        yield {**inputs, x: None}, rf"`{name}` and `{x}`.*\({shape}\) and none"
    yield (
        {**inputs, "vision_indices": indices + 1},
        r"in row 0: \[2, 3, 4, 5\], and .* at \[1, 2, 3, 4\]",
    )
    yield (
        {**inputs, "vision_mask": 0 * mask, "vision_indices": 0 * indices},
        r"`vision_mask`, of shape \(2, 10\).*mask of zeros",
    )
    wrong = (
        (indices[:, :3], r"of length 4, .*\(2, 3\)"),
        (seen[[0, 1, 1]], r"with as many.*\(2, 10\).*\(3, 4, 32\)"),
    )
    if len(seen.shape) == 4:
        wrong = (
            wrong[0],
            (
                seen[[0, 1, 1]],
                r"one row.*\(2, 10\).*\(3, 1, 4, 32\)",
            ),
        )
    if family.with_images:
        wrong = (
            (indices[:, :0], r"with as many.*1 images, at most 4.*\(2, 0\)"),
            wrong[1],
        )
    for x, (value, message) in zip(("vision_indices", "img_embeddings"), wrong):
        changes = {x: value}
        if x == "img_embeddings":
            changes = instead(family, **changes)
        yield {**inputs, **changes}, f"`{x}` {message}|`{x}` to.*{message}"
    first = first_call(family, 4)
    split = {**first, **cached, **instead(family, img_embeddings=seen)}
    split["vision_indices"] = indices * (indices < 4)
    yield split, r"4 tokens side by side.*\(2, 4\) with \[3\] in row 0"


@every_image_model
def test_bad_calls(family):
    backbone, _ = family.pair
    for inputs, message in bad_calls(backbone, family):
        with pytest.raises(ValueError, match=message):
            backbone(inputs)


@every_image_model
def test_bad_prompts(family):
    lm = greedy(family)
    prompt = prompts(family, [8, 11])
    name = family.name_of_images
    wrong = prompt[name][..., :4, :], "width=16"
    if family.with_images:
        wrong = prompt[name][..., :-1], "48"
    one_row = {x: prompt[x][:1] for x in (name, *family.with_images)}
    for change, message in (
        ({name: wrong[0]}, f"`{name}`.*{wrong[1]}"),
        (one_row, f"`{name}`.*row"),
        ({"token_ids": prompt["token_ids"] + 100}, "from 0 to 99, the vocab"),
        ({"padding_mask": 0 * prompt["padding_mask"]}, "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate({**prompt, **change}, stop_token_ids=None)
    with pytest.raises(ValueError, match="Received also: max_new_tokens"):
        lm.generate(prompt, stop_token_ids=None, max_new_tokens=3)


@every_image_in_text
def test_bad_prompts_with_images_in_the_text(family):
    lm = greedy(family)
    prompt = prompts(family, [8, 6])
    with pytest.raises(ValueError, match="prompt 1, which ends with.*at 5"):
        lm.generate(prompt, stop_token_ids=None)
    name = family.name_of_images
    first, *_ = *family.with_images, "vision_indices"
    with pytest.raises(ValueError, match=f"`{name}` with `{first}`"):
        lm.generate({**prompt, name: None}, stop_token_ids=None)
    cache = lm.backbone.make_cache(2, LENGTH)
    with pytest.raises(ValueError, match="no `cache_update_mask`"):
        lm.call_with_cache(TOKENS, cache, 0, cache_update_mask=MASK)
    preprocessor = family.preprocessor(sequence_length=24)
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.task(family.backbone(vocabulary_size=size), preprocessor)
    see = f"what is {family.mark}?"
    for bad, message in (
        ({"prompts": see}, r"\[1\] of them, for \[0\] images"),
        (see, r"\[1\] of them, for \[0\] images"),
        (
            {"prompts": [see, "the fox"], "images": IMAGES},
            r"\[1, 0\] of them, for \[1, 1\] images",
        ),
        (
            {"prompts": [see * 2], "images": [[IMAGES[0]]]},
            r"\[2\] of them, for \[1\] images",
        ),
        (
            {"prompts": [see * 3], "images": [[*IMAGES, IMAGES[0]]]},
            r"at most 2 images for each.*Received: \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate(bad)


@every_image_in_text
def test_several_images_and_none(family):
    """Rows with as many images as they have, and text alone."""
    preprocessor = family.preprocessor(sequence_length=40)
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.task(family.backbone(vocabulary_size=size), preprocessor)
    lm.compile(sampler="greedy")
    generate = functools.partial(lm.generate, stop_token_ids=None)
    see = family.mark
    batch = {
        "prompts": [f"the {see} and {see} fox", f"the quick {see} fox"],
        "images": [[IMAGES[0], IMAGES[1]], [IMAGES[1]]],
    }
    together = generate(batch)
    alone = [
        generate({"prompts": [text], "images": [images]})[0]
        for text, images in zip(batch["prompts"], batch["images"])
    ]
    assert together == alone
    other = {**batch, "images": [[IMAGES[1], IMAGES[0]], [IMAGES[0]]]}
    assert all(x != y for x, y in zip(together, generate(other)))
    # Without images, it is a model like any other.
    text = generate("the quick fox")
    assert text == generate({"prompts": ["the quick fox"]})[0]
    answer = generate(["the quick fox"], max_new_tokens=4)[0]
    assert text.startswith(answer)
    shown = "".join(lm.stream("the quick fox", 4, stop_token_ids=None))
    # Tokens of images, which a preprocessor may leave out.
    assert re.sub(r"<[^<>]*>", "", shown) in text


@on_one_backend("what is called is the graph, as it is elsewhere")
@every_image_in_text
def test_scores(family):
    lm, _ = family.lm_pair
    inputs, blocks = family.inputs(TOKENS, MASK), []
    scores = lm.score(
        inputs, layer_intercept_fn=lambda x, i: blocks.append(i) or x
    )
    assert blocks == list(range(-1, len(lm.backbone.blocks)))
    np.testing.assert_array_equal(
        to_numpy(scores), to_numpy(lm._logits(lm.backbone(inputs)))
    )
    bad = {**inputs, "vision_indices": inputs["vision_indices"][:, 1:]}
    with pytest.raises(ValueError, match="vision_indices"):
        lm.score(bad)


@PALI_GEMMA_ALONE
def test_text_without_an_image(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 11])
    prompt.pop("images")
    with pytest.raises(ValueError, match="`images` of shape"):
        lm.generate(prompt, stop_token_ids=None)
    for method in ("stream", "chat", "generate_many", "score"):
        with pytest.raises(ValueError, match="begins with an image"):
            getattr(lm, method)("the fox")
    with pytest.raises(ValueError, match="prompts are one text"):
        surgery.ControlVector.train(lm, ["the fox"], ["the dog"])


def test_text_alone_stands_where_there_is_no_image():
    """As for a model without a tower, which upstream's does not know."""
    family = BLIP2
    preprocessor = family.preprocessor(sequence_length=LENGTH)
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.task(family.backbone(vocabulary_size=size), preprocessor)
    plain = family.without_images(vocabulary_size=size)
    weights = {x.path: x for x in lm.backbone.weights[-len(plain.weights) :]}
    for weight in plain.weights:
        weight.assign(weights[weight.path])
    tokens, mask = TOKENS % size, padding_mask([10, 7], 10)
    inputs = {"token_ids": tokens, "padding_mask": mask}
    full = to_numpy(plain.backbone(inputs))
    alone = to_numpy(lm.backbone(inputs))
    np.testing.assert_allclose(alone, full, atol=1e-4, rtol=1e-4)
    cache, index = lm.backbone.make_cache(2, 10), 0
    for count in (3, 1, 6):
        given = tokens[:, index : index + count]
        step = {"token_ids": given, "cache_update_index": index}
        output, cache = lm.backbone(
            {**step, "cache": cache, "padding_mask": mask}
        )
        np.testing.assert_allclose(
            to_numpy(output), full[:, index : index + count], atol=1e-4
        )
        index += count
    plain.preprocessor = preprocessor
    for x in (lm, plain):
        x.compile(sampler="greedy")
    texts = ["the quick fox", "airplane"]
    expected = plain.generate(texts)
    assert lm.generate(texts) == expected
    assert lm.generate({"text": texts}) == expected
    answers = lm.generate(texts, max_new_tokens=2)
    assert all(x.startswith(y) for x, y in zip(expected, answers))
    with pytest.raises(ValueError, match="`text`, a string.*'images'"):
        lm.generate({"images": IMAGES})
    with pytest.raises(ValueError, match="without a `vision_encoder`"):
        plain.generate({"images": IMAGES, "text": texts})
    with pytest.raises(ValueError, match="unknown key: 'images'"):
        plain.backbone({**inputs, "images": IMAGES})
    with pytest.raises(ValueError, match="positions from 0 to 63"):
        lm.backbone({"token_ids": np.ones((2, 61), "int32"), "images": IMAGES})


def test_models_that_do_not_go_together():
    parts = dict(BLIP2.config)
    for changes, message in (
        ({"language_model": None}, "CustomOPT` or a .*Received.*NoneType"),
        ({"qformer": None}, "or neither of them.*and None"),
        (
            {"qformer": None, "vision_encoder": None},
            "the `qformer` has, 0 without one. Received: 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            BLIP2.ours("Backbone")(**{**parts, **changes})
    edited = surgery.remove(BLIP2.pair[0], "decoder.0")
    with pytest.raises(ValueError, match="`language_model`.*`layer_norm`"):
        _ = edited.language_model


def test_upstream_methods_of_blip2():
    lm, upstream = BLIP2.lm_pair
    tokens, mask = np.pad(TOKENS, ((0, 0), (0, 2))), padding_mask([10, 7], 12)
    found = []
    for x in (lm, upstream):
        seen = upstream._encode_images(IMAGES)
        _, cache = x._build_cache(tokens, seen, np.ones_like(mask))
        logits, _, _ = x.call_with_cache(TOKENS[:, :1], cache, 4 + 10)
        read, _, _ = x.call_with_cache(tokens, cache, 0, seen, mask)
        found.append((to_numpy(logits), to_numpy(read)[mask == 1]))
    for x, y in zip(*found):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


@on_one_backend("what a user says is read the same on all")
@every_image_model
def test_max_length_without_a_preprocessor(family):
    lm = greedy(family)
    prompt = prompts(family, [8, 9])
    longer = {
        name: x[:, :10] if x.shape[1:] == (LENGTH,) else x
        for name, x in prompt.items()
    }
    expected = lm.generate(prompt, stop_token_ids=None)
    generated = lm.generate(longer, max_length=LENGTH, stop_token_ids=None)
    np.testing.assert_array_equal(generated["token_ids"], expected["token_ids"])
    with pytest.raises(ValueError, match="at most `max_length`=7"):
        lm.generate(longer, max_length=7, stop_token_ids=None)


@on_one_backend("what is a user's to do is Keras' to do")
@every_image_model
def test_quantized_and_steered(family):
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 9])
    before = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    direction = np.random.default_rng(0).normal(size=32)
    hint = family.prefix.lower()
    vector = surgery.ControlVector({1: direction}, model_hint=hint)
    steered = vector.apply(lm, strength=4.0, generated_only=True)
    after = steered.generate(prompt, stop_token_ids=None)["token_ids"]
    assert (after != before).any()
    # The tower has weights that no step reads, and kernels need not know.
    tower = {id(x) for x in lm.backbone.prefill_layers}
    assert len(tower) > 8
    lm.quantize("int8")
    tokens = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    given = prompt["padding_mask"] == 1
    np.testing.assert_array_equal(tokens[given], prompt["token_ids"][given])


@on_one_backend("upstream's preprocessor makes images of frames")
def test_frames_are_images():
    family = next(x for x in IMAGE_MODELS if x.name == "gemma4_vision")
    family = family.decoded_as_read
    frames = np.concatenate([IMAGES, IMAGES[::-1]])
    inputs = {"prompts": "the <|video|> fox", "videos": frames}
    for tokens in (4, 5):
        converter = dict(
            patch_size=4, max_soft_tokens=tokens, pooling_kernel_size=2
        )
        preprocessor = family.preprocessor(
            sequence_length=48,
            video_converter=keras_hub.layers.Gemma4VideoConverter(
                num_frames=2, **converter
            ),
            num_frames_per_video=2,
        )
        size = preprocessor.tokenizer.vocabulary_size()
        backbone = family.backbone(vocabulary_size=size)
        lm = family.task(backbone, preprocessor)
        lm.compile(sampler="greedy")
        if tokens == 5:
            # A square has four, and upstream takes one of the next for it.
            with pytest.raises(ValueError, match="5 tokens side by side"):
                lm.generate(inputs)
            continue
        upstream = family.upstream_task(
            family.upstream_backbone(backbone, vocabulary_size=size),
            preprocessor,
        )
        upstream.compile(sampler="greedy")
        assert lm.generate(inputs) == upstream.generate(dict(inputs))
        with pytest.raises(ValueError, match="with an `audio_converter`"):
            lm.generate({**inputs, "audio": np.zeros(8)})
