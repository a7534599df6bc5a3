"""Images of any size stand in a text, their tokens in a grid."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import device
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from tests.edits import EDITS
from tests.families import compiled
from tests.families import every_grid_model
from tests.families import GRID_MODELS
from tests.families import ImagesInGrids
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import XLA

LENGTH = 16
TOKENS = random_tokens(2, 10)
MASK = np.ones_like(TOKENS)
IMAGES = ("pixel_values", "image_grid_thw", "vision_indices")
NO_IMAGES = dict.fromkeys(IMAGES)


def stands(grids, places, length):
    """Where tokens stand, `(4, length)`, as the models were trained.

    Args:
        grids: How many rows and columns of patches each image has.
        places: Which tokens are of them.
        length: int.
    """
    found, here, at = [], 0, 0
    starts = np.cumsum([0, *(h * w // 4 for h, w in grids)])[:-1].tolist()
    starts = {places[i]: grid for i, grid in zip(starts, grids)}
    while at < length:
        height, width = (x // 2 for x in starts.get(at, (2, 2)))
        found += [
            (here, here, here + row, here + column)
            for row in range(height)
            for column in range(width)
        ]
        here += max(height, width)
        at += height * width
    return np.array(found, "int32").T


def in_grids(family, length=10):
    """Where the tokens of a batch of two stand."""
    both = zip(family.grids, family.places)
    return np.stack([stands(*of_row, length) for of_row in both])


def full_forward(backbone, family, **changes):
    """What becomes of images and text without a cache."""
    outputs = backbone({**family.inputs(TOKENS, MASK), **changes})
    return to_numpy(outputs[0] if isinstance(outputs, tuple) else outputs)


def cached_forward(backbone, family, sizes=(3, 5, 1, 1), positions=None):
    """The same through a cache, of images that were embedded before."""
    embeddings = to_numpy(backbone.embed(family.inputs(TOKENS, MASK)))
    cache, index = backbone.make_cache(2, LENGTH), 0
    found = []
    for size in sizes:
        now = slice(index, index + size)
        inputs = {"token_ids": TOKENS[:, now], "cache_update_index": index}
        if index < 7:
            inputs["embeddings"] = embeddings[:, now]
            if positions is not None:
                inputs["position_ids"] = positions[:, :, now]
        output, cache, *_ = compiled(backbone)({**inputs, "cache": cache})
        found.append(to_numpy(output))
        index += size
    return np.concatenate(found, axis=1)


def assert_close(x, y):
    np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


# === The graph ===


@every_grid_model
def test_where_tokens_stand(family):
    """In a grid, as where upstream's layers are told so, or in a row."""
    backbone, upstream = family.pair
    inputs = family.inputs(TOKENS, MASK)
    positions = in_grids(family)
    # After an image, text goes on where its longer side ends.
    np.testing.assert_array_equal(
        positions[:, 3],
        [[0, 1, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
    )
    x = upstream.interleave_embeddings(
        image_embeddings=upstream.vision_encoder(
            *(ops.convert_to_tensor(inputs[name]) for name in IMAGES[:2])
        ),
        text_embeddings=upstream.token_embedding(TOKENS),
        vision_indices=ops.convert_to_tensor(inputs["vision_indices"]),
    )
    for layer in upstream.transformer_layers:
        x = layer(
            x,
            decoder_padding_mask=ops.convert_to_tensor(MASK),
            position_ids=ops.convert_to_tensor(positions),
        )
    found = full_forward(backbone, family, position_ids=positions)
    assert_close(found, to_numpy(upstream.layer_norm(x)))
    in_a_row = full_forward(backbone, family)
    assert np.abs(found - in_a_row).max() > 1e-2
    row = np.broadcast_to(np.arange(10, dtype="int32"), (2, 4, 10))
    assert_close(full_forward(backbone, family, position_ids=row), in_a_row)


@every_grid_model
@pytest.mark.parametrize("sizes", [(10,), (7, 1, 1, 1), (3, 5, 1, 1)])
def test_prefill_and_steps(family, sizes):
    """Calls may end in the middle of an image. Steps know where they stand."""
    backbone, _ = family.pair
    positions = in_grids(family)
    for given in ({}, {"position_ids": positions}):
        assert_close(
            cached_forward(backbone, family, sizes, given.get("position_ids")),
            full_forward(backbone, family, **given),
        )
    # What it sees matters.
    pixels = family.inputs(TOKENS, MASK)["pixel_values"]
    other = full_forward(backbone, family, pixel_values=-pixels)
    assert np.abs(other - full_forward(backbone, family)).max() > 1e-2


@every_grid_model
def test_a_call_for_each_image(family):
    """Each call has the images that stand in its tokens."""
    backbone, _ = family.pair
    inputs = family.inputs(TOKENS, MASK)
    positions = in_grids(family)
    full = full_forward(backbone, family, position_ids=positions)
    grids = inputs["image_grid_thw"]
    ends = grids[:, 0].prod(axis=1)
    cache, found = backbone.make_cache(2, LENGTH), []
    for i, now, places in (
        (0, slice(0, 4), [0, 1, 2, 3, 4 + 1, 4 + 2]),
        (1, slice(4, 10), [2, 6 + 0, 6 + 1, 6 + 2]),
    ):
        pixels = [
            x[end:] if i else x[:end]
            for x, end in zip(inputs["pixel_values"], ends)
        ]
        # As a preprocessor makes them, without rows.
        output, cache = backbone(
            {
                "token_ids": TOKENS[:, now],
                "pixel_values": np.concatenate(pixels),
                "image_grid_thw": grids[:, i],
                "vision_indices": places,
                "position_ids": positions[:, :, now],
                "cache": cache,
                "cache_update_index": now.start,
            }
        )
        found.append(to_numpy(output))
    assert_close(np.concatenate(found, axis=1), full)


@every_grid_model
def test_parts_of_the_graph(family):
    backbone, _ = family.pair
    inputs = family.inputs(TOKENS, MASK)
    full = full_forward(backbone, family)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    seen = backbone.encode_images(pixels, image_grid_thw=grid)
    np.testing.assert_array_equal(
        to_numpy(seen), to_numpy(backbone.vision_encoder(pixels, grid))
    )
    embeddings = backbone.embed(inputs)
    for given in ({"img_embeddings": seen}, {"embeddings": embeddings}):
        none = {"pixel_values": None, "image_grid_thw": None}
        assert_close(full_forward(backbone, family, **none, **given), full)
    # Nothing is left of images of no size, as upstream's text has them.
    empty = {
        "pixel_values": np.zeros((2, 0, 2, 4, 4, 3)),
        "image_grid_thw": np.zeros((2, 0, 3), "int32"),
        "vision_indices": np.zeros((2, 0), "int32"),
    }
    text = full_forward(backbone, family, **NO_IMAGES)
    np.testing.assert_array_equal(full_forward(backbone, family, **empty), text)


@every_grid_model
def test_padding_and_places_of_its_own(family):
    """Where a row goes on is what its last token says that is no padding."""
    backbone, _ = family.pair
    positions = in_grids(family)
    full = full_forward(backbone, family, position_ids=positions)
    embeddings = to_numpy(backbone.embed(family.inputs(TOKENS, MASK)))
    said = positions.copy()
    said[0, :, 7:] = 0  # As for padding in transformers.
    index = np.array([7, 9])
    read = compiled(backbone)
    _, cache = read(
        {
            "token_ids": TOKENS[:, :9],
            "embeddings": embeddings[:, :9],
            "position_ids": said[:, :, :9],
            "padding_mask": padding_mask(index, LENGTH),
            "cache": backbone.make_cache(2, LENGTH),
            "cache_update_index": 0,
        }
    )
    np.testing.assert_array_equal(to_numpy(cache[-1][0].stored), [[-2], [0]])
    step, cache = read(
        {
            "token_ids": TOKENS[[0, 1], index][:, None],
            "cache": cache,
            "cache_update_index": index,
        }
    )
    assert_close(to_numpy(step)[:, 0], full[[0, 1], index])
    # A text begins where it begins, whatever is there of another one.
    text = full_forward(backbone, family, **NO_IMAGES)
    output, cache = read(
        {"token_ids": TOKENS, "cache": cache, "cache_update_index": 0}
    )
    assert_close(to_numpy(output), text)
    assert not to_numpy(cache[-1][0].stored).any()


# === Generating ===


def prompts(family, given, **further):
    """What a task is called with, for prompts of some lengths."""
    mask = padding_mask(given, LENGTH)
    inputs = family.inputs(random_tokens(2, LENGTH, seed=1) * mask, mask)
    return {**inputs, **further}


def row_of(family, prompt, row):
    """One of two prompts, with its images, alone."""
    alone = {k: x[row : row + 1] for k, x in prompt.items()}
    alone["vision_indices"] = alone["vision_indices"] - row * LENGTH
    return alone


def assert_greedy(family, prompt, token_ids, lm):
    """Each token is the likeliest after images and those before it.

    Each row alone, all at once and without a cache.
    """
    given = prompt["padding_mask"] == 1
    np.testing.assert_array_equal(token_ids[given], prompt["token_ids"][given])
    for row in range(len(token_ids)):
        inputs = row_of(family, prompt, row)
        inputs["token_ids"] = token_ids[row : row + 1]
        inputs["padding_mask"] = np.ones_like(inputs["token_ids"])
        likeliest = to_numpy(lm._logits(lm.backbone(inputs)))[0].argmax(axis=-1)
        new = ~given[row, 1:]
        np.testing.assert_array_equal(
            token_ids[row, 1:][new], likeliest[:-1][new]
        )


@every_grid_model
def test_greedy(family):
    """Rows together are what they are alone, and without a cache."""
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy", **XLA)
    found = []
    for given, further in (
        ([8, 8], {}),
        ([8, 11], {"position_ids": in_grids(family, LENGTH)}),
    ):
        prompt = prompts(family, given, **further)
        generated = lm.generate(prompt, stop_token_ids=None)
        assert set(generated) == {"token_ids", "padding_mask"}
        assert_greedy(family, prompt, generated["token_ids"], lm)
        found.append(generated["token_ids"])
    assert len(np.unique(found[0][:, 8:])) > 3
    # What follows an image is read in pieces, as few as there may be.
    device.set_constants(compiled_chunk=2, eager_chunk=2)
    try:
        lm.compile(sampler="greedy", cache_policy="rotating")
        again = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    finally:
        device.set_constants()
    np.testing.assert_array_equal(again, found[1])


@every_grid_model
def test_more_images_in_some_rows(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompt = prompts(family, [9, 11])
    # The second row has one less, the first one of them.
    pixels, grids = prompt["pixel_values"], prompt["image_grid_thw"]
    prompt["pixel_values"] = np.concatenate([*pixels[:, :20], pixels[1, :0]])
    prompt["pixel_values"] = np.concatenate([pixels[0], pixels[1, 8:]])
    prompt["image_grid_thw"] = np.concatenate([grids[0], grids[1, 1:]])
    first, second = prompt["vision_indices"]
    prompt["vision_indices"] = np.concatenate([first, second[2:]])
    together = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    for row, of_row in enumerate(
        (
            (pixels[0], grids[0], first),
            (pixels[1, 8:], grids[1, 1:], second[2:] - LENGTH),
        )
    ):
        alone = {k: prompt[k][row : row + 1] for k in prompt if "_" in k}
        alone |= dict(zip(IMAGES, of_row))
        np.testing.assert_array_equal(
            lm.generate(alone, stop_token_ids=None)["token_ids"][0],
            together[row],
        )


@on_one_backend("what a user says is read the same on all")
@every_grid_model
def test_max_length_without_a_preprocessor(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    further = {"position_ids": in_grids(family, LENGTH)}
    prompt = prompts(family, [8, 9], **further)
    mask = padding_mask([8, 9], 10)
    longer = {
        **family.inputs(prompt["token_ids"][:, :10], mask),
        "position_ids": prompt["position_ids"][:, :, :10],
    }
    np.testing.assert_array_equal(
        lm.generate(longer, max_length=LENGTH, stop_token_ids=None)[
            "token_ids"
        ],
        lm.generate(prompt, stop_token_ids=None)["token_ids"],
    )
    with pytest.raises(ValueError, match="at most `max_length`=7"):
        lm.generate(longer, max_length=7, stop_token_ids=None)


@pytest.mark.parametrize(
    "length, chunk, expected", [(9, 1, 7), (9, 4, 8), (8, 4, 8), (250, 100, 9)]
)
def test_how_much_is_read_with_images(length, chunk, expected):
    lm, _ = GRID_MODELS[0].lm_pair
    of_images = np.zeros((2, 12), bool)
    of_images[1, 6] = True
    rng = np.random.default_rng(0)
    source = {
        "embeddings": rng.normal(size=(2, 12, 32)),
        "position_ids": rng.integers(1, 9, (2, 4, 12)),
        "of_images": of_images,
    }
    slots = 256 if length < 12 else 9
    fitted = lm.fitted_source(source, length, slots, chunk)
    assert lm.read_with(fitted) == expected
    for name, axis in (("embeddings", 1), ("position_ids", 2)):
        np.testing.assert_array_equal(
            fitted[name], np.take(source[name], range(expected), axis=axis)
        )
    # The last token is read by the first step.
    real = min(expected, length - 1)
    np.testing.assert_array_equal(
        fitted["padding_mask"], padding_mask([real, real], expected)
    )
    source["of_images"] = 0 * of_images
    assert lm.fitted_source(source, length, slots, chunk) == {}
    assert lm.read_with({}) == 0


@on_one_backend("calls are counted")
@every_grid_model
def test_images_are_seen_once(family, monkeypatch):
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy", run_eagerly=True)
    calls = []
    for part in (lm.backbone.vision_encoder.patch_embed, *lm.backbone.blocks):
        call = part.call

        def counted(x, *args, call=call, name=part.name, **kwargs):
            calls.append((name, x.shape[0]))
            return call(x, *args, **kwargs)

        monkeypatch.setattr(part, "call", counted)
    lm.generate(prompts(family, [8, 11]), stop_token_ids=None)
    assert [x for x in calls if x[0] == "patch_embed"] == [("patch_embed", 40)]
    names = [name for name, _ in calls]
    for block in lm.backbone.blocks:
        # One step at least for each token of the row that is shorter.
        assert names.count(block.name) >= LENGTH - 8


@on_one_backend("operators are counted")
@every_grid_model
def test_a_step_is_that_of_a_model_without_images(family):
    counts = []
    for see in (True, False):
        config = {**dict(family.config), "vision_encoder": None}
        lm = family.lm_pair[0]
        if not see:
            lm = family.task(family.ours("Backbone")(**config))
        lm.compile(sampler="greedy")
        prompt = prompts(family, [8, 8], **({} if see else NO_IMAGES))
        lm.generate(prompt, stop_token_ids=None)
        ((_, step),) = lm.generation_loop._captured.values()
        counts.append(len(list(step.graph.nodes)))
    # Where the text goes on, and what says so, of each row one number.
    assert 0 < counts[0] - counts[1] < 16


# === Text ===


@functools.cache
def with_text(family):
    """A task with a preprocessor, and upstream's preprocessor."""
    theirs = family.preprocessor(sequence_length=40)
    size = theirs.tokenizer.vocabulary_size()
    lm = family.task(family.backbone(vocabulary_size=size), theirs)
    lm.compile(sampler="greedy")
    return lm, theirs


def picture(height, width, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (height, width, 3))


SEE = ImagesInGrids.mark


@every_grid_model
def test_what_is_read_of_a_prompt(family):
    """As upstream's preprocessor, but for the order of patches."""
    lm, theirs = with_text(family)
    image = picture(8, 16).astype("float32")
    prompt = {"prompts": [f"the {SEE}fox"], "images": [image]}
    found = lm.preprocessor.generate_preprocess(dict(prompt))
    expected = theirs.generate_preprocess(dict(prompt))
    assert set(found) == set(expected)
    found, expected = (
        {k: to_numpy(x) for k, x in read.items()} for read in (found, expected)
    )
    for name in set(found) - {"pixel_values"}:
        np.testing.assert_array_equal(found[name], expected[name], name)
    grid = found["image_grid_thw"]
    np.testing.assert_array_equal(grid, [[1, 2, 4]])
    length = found["token_ids"].shape[1]
    places = found["vision_indices"].astype("int32").tolist()
    np.testing.assert_array_equal(
        found["position_ids"][0], stands([(2, 4)], places, length)
    )
    # Four of them side by side become a token: here, row by row, two each.
    patches = image.reshape(2, 4, 4, 4, 3).swapaxes(1, 2) / 255
    merged = patches.reshape(2, 2, 2, 4, 4, 3).swapaxes(0, 1)
    np.testing.assert_allclose(
        found["pixel_values"][:, 0], merged.reshape(8, 4, 4, 3), atol=1e-6
    )


@every_grid_model
def test_several_images_and_none(family):
    """Rows with as many images as they have, of any size, and text alone."""
    lm, _ = with_text(family)
    small, wide, high = picture(8, 8), picture(8, 16, 1), picture(16, 8, 2)
    batch = {
        "prompts": [
            f"the {SEE} and {SEE} fox",
            "the quick fox",
            f"a {SEE} fox",
        ],
        "images": [[small, wide], [], [high]],
    }
    together = lm.generate(batch)
    alone = [
        lm.generate({"prompts": [text], "images": [images]})[0]
        for text, images in zip(batch["prompts"], batch["images"])
    ]
    assert together == alone
    # In one list, as upstream takes them.
    assert lm.generate({**batch, "images": [small, wide, high]}) == together
    one = {"prompts": batch["prompts"][2], "images": high}
    assert lm.generate(one) == together[2]
    assert lm.generate({**one, "images": high[::-1]}) != together[2]
    assert together[2].endswith(lm.generate(one, strip_prompt=True))
    # Without images, it is a model like any other.
    text = lm.generate("the quick fox")
    assert text == together[1] == lm.generate({"prompts": ["the quick fox"]})[0]
    answer = lm.generate(["the quick fox"], max_new_tokens=4)[0]
    assert text.startswith(answer)


@every_grid_model
def test_text_is_greedy(family):
    """What is generated after a prompt with images, all at once."""
    lm, _ = with_text(family)
    batch = {
        "prompts": [f"the {SEE} fox", f"a {SEE}{SEE} dog over"],
        "images": [picture(8, 16), picture(16, 16, 1), picture(8, 8, 2)],
    }
    assert_read_greedily(lm, batch)


def assert_read_greedily(lm, batch):
    read = lm.preprocessor.generate_preprocess(batch, sequence_length=40)
    read = {k: ops.convert_to_numpy(x) for k, x in read.items()}
    generated = lm._generate(read)["token_ids"]
    everything = {**read, "token_ids": generated}
    everything["padding_mask"] = np.ones_like(generated)
    likeliest = to_numpy(lm._logits(lm.backbone(everything))).argmax(axis=-1)
    new = read["padding_mask"][:, 1:] == 0
    np.testing.assert_array_equal(generated[:, 1:][new], likeliest[:, :-1][new])


@every_grid_model
def test_a_video(family):
    lm, theirs = with_text(family)
    converter = keras_hub.layers.Qwen3_5VideoConverter(
        patch_size=4, min_pixels=64, max_pixels=1024, scale=1 / 255
    )
    seeing = type(lm.preprocessor)(
        theirs.tokenizer,
        image_converter=theirs.image_converter,
        video_converter=converter,
        sequence_length=64,
    )
    lm = family.task(lm.backbone, seeing)
    lm.compile(sampler="greedy")
    video = np.stack([picture(8, 8, seed) for seed in range(4)])
    marker = "<|vision_start|><|video_pad|><|vision_end|>"
    batch = {
        "prompts": [f"the {marker} fox", f"the {SEE} dog"],
        "videos": [[video], []],
        "images": [[], [picture(8, 8)]],
    }
    together = lm.generate(batch)
    for row, text in enumerate(batch["prompts"]):
        alone = {"prompts": [text]}
        alone |= {x: [batch[x][row]] for x in ("images", "videos")}
        assert lm.generate(alone) == [together[row]]
    assert_read_greedily(lm, batch)
    other = {**batch, "videos": [[255 - video], []]}
    read, seen = (
        to_numpy(lm.backbone.embed(seeing.generate_preprocess(x)))
        for x in (batch, other)
    )
    assert (read[0] != seen[0]).any() and (read[1] == seen[1]).all()


@every_grid_model
def test_a_preset_goes_both_ways(family, tmp_path):
    lm, theirs = with_text(family)
    prompt = {"prompts": f"the {SEE} fox", "images": picture(8, 16)}
    expected = lm.generate(prompt)
    lm.save_to_preset(tmp_path)
    upstream = family.upstream("CausalLM").from_preset(str(tmp_path))
    assert type(upstream.preprocessor) is type(theirs)
    assert upstream.backbone.vision_encoder is not None
    loaded = models.CausalLM.from_preset(str(tmp_path))
    loaded.compile(sampler="greedy")
    assert loaded.generate(prompt) == expected
    upstream.save_to_preset(tmp_path / "again")
    loaded = models.CausalLM.from_preset(str(tmp_path / "again"))
    assert type(loaded.preprocessor) is type(lm.preprocessor)


# === A task's other methods ===


@every_grid_model
@pytest.mark.parametrize("mode", ["logits", "loss"])
def test_scores_are_upstream_s(family, mode):
    inputs = {**family.inputs(TOKENS, MASK), "position_ids": in_grids(family)}
    inputs = {k: ops.convert_to_tensor(x) for k, x in inputs.items()}
    seen, targets = {}, np.roll(TOKENS, -1, axis=1)

    def intercept(x, index):
        seen.setdefault(index, []).append(to_numpy(x))
        return x * 1.5 + 0.1

    for change in (None, intercept):
        ours, theirs = (
            to_numpy(lm.score(inputs, None, mode, change, targets))
            for lm in family.lm_pair
        )
        np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=5e-4)
    assert sorted(seen) == list(range(-1, len(family.pair[0].blocks)))
    for ours, theirs in seen.values():
        np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=5e-4)
    bad = {**inputs, "image_grid_thw": inputs["image_grid_thw"] + 1}
    with pytest.raises(ValueError, match="multiples of 2"):
        family.lm_pair[0].score(bad)


@on_one_backend("gradients are taken of what is called, and compared")
@every_grid_model
def test_gradients(family):
    """They are upstream's, whose `fit()` cannot build a model that sees."""
    ours = family.task(family.backbone())
    theirs = family.upstream_task(family.upstream_backbone(ours.backbone))
    inputs = family.inputs(TOKENS, MASK)
    inputs = {k: ops.convert_to_tensor(x) for k, x in inputs.items()}
    for lm in (ours, theirs):
        ops.logsumexp(lm(inputs)).backward()
    seen = 0
    for x, y in zip(ours.weights, theirs.weights, strict=True):
        x, y = (to_numpy(weight.value.grad) for weight in (x, y))
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4)
        seen += bool(x.any())
    assert seen > 20


@on_one_backend("what is a user's to do is Keras' to do")
@every_grid_model
def test_quantized_and_steered(family):
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 9])
    before = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    direction = np.random.default_rng(0).normal(size=32)
    vector = surgery.ControlVector({1: direction}, model_hint="qwen3_5")
    steered = vector.apply(lm, strength=8.0, generated_only=True)
    after = steered.generate(prompt, stop_token_ids=None)["token_ids"]
    assert (after != before).any()
    lm.quantize("int8")
    tokens = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    given = prompt["padding_mask"] == 1
    np.testing.assert_array_equal(tokens[given], prompt["token_ids"][given])


@on_one_backend("what is called is recorded")
@every_grid_model
def test_what_a_subclass_says_is_called(family):
    called = []

    class Mine(family.ours("CausalLM")):
        def call_with_cache(self, *args, **kwargs):
            called.append("step")
            return super().call_with_cache(*args, **kwargs)

    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 11], position_ids=in_grids(family, LENGTH))
    expected = lm.generate(prompt, stop_token_ids=None)
    mine = Mine(backbone=lm.backbone, preprocessor=None)
    mine.compile(sampler="greedy")
    generated = mine.generate(prompt, stop_token_ids=None)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(generated["token_ids"]), expected["token_ids"]
    )
    assert len(called) > 8


# === Surgery ===

# Of blocks as a whole, those that differ most.
TRIED = ("insert_after", "insert_a_block", "remove", "repeat_blocks", "tap")
if keras.config.backend() != "torch":
    TRIED = ("insert_a_block",)


@functools.cache
def original(family):
    """A task of three blocks, made once, and not changed."""
    return family.task(family.backbone(num_layers=3))


@every_grid_model
@pytest.mark.parametrize("edit", TRIED)
def test_edits(family, edit, tmp_path):
    backbone = original(family).backbone
    positions = in_grids(family)
    given = {"position_ids": positions}
    before = full_forward(backbone, family, **given)
    edited = EDITS[edit].apply(backbone)
    after = full_forward(edited, family, **given)
    np.testing.assert_allclose(
        cached_forward(edited, family, positions=positions),
        after,
        atol=2e-4,
        rtol=1e-3,
    )
    assert (np.abs(after - before).max() > 1e-3) == (edit != "tap")
    assert len(edited.blocks) == EDITS[edit].caches
    np.testing.assert_array_equal(
        full_forward(backbone, family, **given), before
    )
    edited.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras")
    np.testing.assert_allclose(
        full_forward(loaded, family, **given), after, atol=1e-5
    )


@every_grid_model
def test_edits_show_in_generation(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 11], position_ids=in_grids(family, LENGTH))
    before = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    tower = lm.backbone.vision_encoder.name
    for where in (tower, "joined_embeddings", "decoder.1"):
        edited = surgery.insert_after(lm, where, keras.layers.Rescaling(-3.0))
        after = edited.generate(prompt, stop_token_ids=None)["token_ids"]
        assert_greedy(family, prompt, after, edited)
        assert (after != before).any(), where


# === Bad input ===


def bad_calls(backbone, family):
    """Pairs of what a backbone refuses and how it says so."""
    inputs = family.inputs(TOKENS, MASK)
    text = {"token_ids": TOKENS}
    pixels, grid, places = (inputs[name] for name in IMAGES)
    positions = in_grids(family)
    seen = to_numpy(backbone.encode_images(pixels, image_grid_thw=grid))
    yield (
        {**inputs, "pixel_values": pixels[..., :3, :]},
        r"`pixel_values`.*width=4.*3, 3\)",
    )
    yield (
        {**inputs, "img_embeddings": seen},
        "computed of some before. Received: pixel_values and img_embeddings",
    )
    yield (
        {**inputs, "pixel_values": None},
        r"`pixel_values` with `image_grid_thw`. Received: no images, .*2, 2, 3",
    )
    yield (
        {**text, "vision_indices": places},
        r"`pixel_values` with `vision_indices`. Received: no .*\(2, 5\)",
    )
    yield (
        {**text, "pixel_values": pixels},
        "and no image_grid_thw and no vision_indices",
    )
    yield (
        {**text, "img_embeddings": seen},
        r"`vision_indices` with images. Rec.*\(1, 10, 32\), and no vis",
    )
    yield (
        {**inputs, "pixel_values": pixels[:, :-1]},
        r"the 40 patches of `image_grid_thw`.*Received: 38",
    )
    yield (
        {**inputs, "image_grid_thw": grid + [0, 0, 1]},
        r"multiples of 2. Received: \[\[1, 4, 5\]",
    )
    yield (
        {**inputs, "vision_indices": places[:, :-1]},
        r"all 10 tokens of images. Received shape: \(2, 4\)",
    )
    yield (
        {**inputs, "vision_indices": places + 10},
        r"from 0 to 19, row by row.*Received: \[10, 11",
    )
    yield (
        {**inputs, "vision_indices": 0 * places},
        r"each once, for `token_ids` of shape \(2, 10\)",
    )
    yield (
        {**text, "embeddings": np.zeros((2, 3, 32))},
        r"`embeddings` of length 10, .*\(2, 3, 32\)",
    )
    yield (
        {**inputs, "position_ids": positions[:, :3]},
        r"`position_ids`.*rows=4.*\(2, 3, 10\)",
    )
    yield (
        {**inputs, "position_ids": positions[:, :, :9]},
        r"`position_ids` of shape \(batch, 4, 10\).*\(2, 4, 9\)",
    )
    yield (
        {
            **inputs,
            "position_ids": positions,
            "token_positions": positions[:, 0],
        },
        "`position_ids` or `token_positions`.*both",
    )


@every_grid_model
def test_bad_calls(family):
    backbone, _ = family.pair
    for inputs, message in bad_calls(backbone, family):
        with pytest.raises(ValueError, match=message):
            backbone(inputs)


@pytest.mark.skipif(
    keras.config.backend() == "torch",
    reason="PyTorch compiles nothing that has a value already",
)
@every_grid_model
def test_what_is_compiled_has_no_tower(family):
    backbone, _ = family.pair

    def call(grid):
        inputs = family.inputs(TOKENS, MASK)
        return backbone({**inputs, "image_grid_thw": grid})

    grid = family.inputs(TOKENS, MASK)["image_grid_thw"]
    if keras.config.backend() == "jax":
        import jax

        call = jax.jit(call)
    else:
        import tensorflow as tf

        call = tf.function(call, autograph=False)
    with pytest.raises(ValueError, match="`image_grid_thw` to hold numbers"):
        call(ops.convert_to_tensor(grid))


@every_grid_model
def test_bad_prompts(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompt = prompts(family, [8, 11])
    for change, message in (
        ({"pixel_values": prompt["pixel_values"][..., :2, :]}, "width=4"),
        ({"vision_indices": prompt["vision_indices"] + 1}, "prompt 0 of 8 tok"),
        ({"pixel_values": None}, "`pixel_values` with `image_grid_thw`"),
        ({"token_ids": prompt["token_ids"] + 100}, "from 0 to 99, the vocab"),
        ({"padding_mask": 0 * prompt["padding_mask"]}, "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate({**prompt, **change}, stop_token_ids=None)
    with pytest.raises(ValueError, match="Received also: max_new_tokens"):
        lm.generate(prompt, stop_token_ids=None, max_new_tokens=3)
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    with pytest.raises(ValueError, match="one token at a time.*BeamSampler"):
        lm.generate(prompt, stop_token_ids=None)


@on_one_backend("what is counted does not depend on one")
@every_grid_model
def test_bad_text(family):
    lm, _ = with_text(family)
    see, image = f"what is {SEE} there", picture(8, 8)
    for bad, message in (
        ({"prompts": see}, r"\[1\] of them, for 0 images"),
        (see, r"\[1\] of them, for 0 images"),
        ({"prompts": "the fox", "images": image}, r"\[0\] .*for 1 images"),
        (
            {"prompts": [see, "the fox"], "images": [image, image]},
            r"\[1, 0\] of them, for 2 images",
        ),
        (
            {"prompts": [see, "the fox"], "images": [[], [image]]},
            r"\[1, 0\] of them, for \[0, 1\] images",
        ),
        ({"prompts": f"the {SEE}", "images": [image]}, None),
        ({"prompts": "the <|image_pad|>", "images": [image]}, "end with a tok"),
    ):
        if message is None:
            lm.generate(bad)  # Its last token is one of text.
            continue
        with pytest.raises(ValueError, match=message):
            lm.generate(bad)
    with pytest.raises(ValueError, match=r"image_pad\|>', which stands for"):
        lm.start_session().send(see)
    with pytest.raises(ValueError, match="may have lost some"):
        lm.generate({"prompts": see, "images": [image]}, max_length=4)
