"""The same random weights give the logits and the words of transformers."""

import keras
import numpy as np
import pytest

from keras_nlp_cache import models
from tests.families import compiled
from tests.families import divided
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import SOUND
from tests.families import to_numpy
from tests.transformers_models import ENCODER_DECODERS
from tests.transformers_models import FAMILIES
from tests.transformers_models import GRID_MODELS
from tests.transformers_models import IMAGE_MODELS
from tests.transformers_models import MAX_LENGTH
from tests.transformers_models import PROMPT_LENGTH

# Chosen so that no two words are nearly as likely, in any of the models.
TOKEN_IDS = random_tokens(2, PROMPT_LENGTH, seed=11)
TOLERANCE = dict(atol=1e-4, rtol=1e-4)
# That every family has a class is what `test_coverage.py` asks.
NAMES = [
    name
    for name, family in FAMILIES.items()
    if hasattr(models, f"{family.prefix}CausalLM")
]


@pytest.fixture(autouse=True, scope="module")
def _short_chunks():
    """As long as those of transformers: what is rounded counts here."""


@pytest.fixture(scope="module", params=divided(NAMES))
def pair(request, tmp_path_factory):
    """A model of transformers, and ours that was read from its directory."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    family.save(folder)
    return family, family.load(models, folder)


def test_logits(pair):
    theirs, lm = pair
    mask = padding_mask([PROMPT_LENGTH, PROMPT_LENGTH - 7], PROMPT_LENGTH)
    expected = theirs.logits(TOKEN_IDS, mask)
    real = mask.astype(bool)
    inputs = {"token_ids": TOKEN_IDS, "padding_mask": mask}
    full = to_numpy(compiled(lm)(inputs))
    np.testing.assert_allclose(full[real], expected[real], **TOLERANCE)

    cache = lm.backbone.make_cache(2, PROMPT_LENGTH)
    call_with_cache = compiled(lm.call_with_cache)
    logits, start = [], 0
    for length in (PROMPT_LENGTH - 2, 1, 1):
        now = TOKEN_IDS[:, start : start + length]
        output, _, cache = call_with_cache(
            keras.ops.convert_to_tensor(now), cache, start
        )
        logits.append(to_numpy(output))
        start += length
    logits = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(logits[real], expected[real], **TOLERANCE)


@on_one_backend("what follows from the same logits is compared")
def test_greedy_generation(pair):
    theirs, lm = pair
    room = ((0, 0), (0, MAX_LENGTH - PROMPT_LENGTH))
    lm.compile(sampler="greedy")
    output = lm.generate(
        {
            "token_ids": np.pad(TOKEN_IDS, room),
            "padding_mask": np.pad(np.ones_like(TOKEN_IDS), room),
        },
        stop_token_ids=None,
    )
    np.testing.assert_array_equal(output["token_ids"], theirs.greedy(TOKEN_IDS))


@pytest.mark.parametrize("name", divided(ENCODER_DECODERS))
def test_encoder_decoders(name, tmp_path):
    theirs = ENCODER_DECODERS[name]
    theirs.save(tmp_path)
    lm = theirs.load(models, tmp_path)
    source = random_tokens(2, PROMPT_LENGTH, seed=12)
    mask = padding_mask([PROMPT_LENGTH, PROMPT_LENGTH - 7], PROMPT_LENGTH)
    if lm.backbone.roles.source_ids == "encoder_input_values":
        # Of sound, transformers finds less to be padding.
        source = SOUND["encoder_input_values"]
        mask = np.ones(source.shape[:2], "int32")
    token_ids = TOKEN_IDS.copy()
    token_ids[:, 0] = theirs.start
    expected = theirs.logits(source, mask, token_ids)
    inputs = dict(zip(lm.backbone.roles.of_source, (source, mask)))
    inputs |= theirs.beside
    full = compiled(lm)(
        {
            **inputs,
            "decoder_token_ids": token_ids,
            "decoder_padding_mask": np.ones_like(token_ids),
        }
    )
    # T5 does not scale its logits down, which enlarges what is rounded.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(to_numpy(full), expected, atol=2e-4 * largest)
    # Longer than a window, as is what the encoder reads.
    room = ((0, 0), (0, MAX_LENGTH - PROMPT_LENGTH))
    lm.compile(sampler="greedy")
    output = lm.generate(
        {
            **inputs,
            "decoder_token_ids": np.pad(token_ids, room),
            "decoder_padding_mask": np.pad(np.ones_like(token_ids), room),
        },
        stop_token_ids=None,
    )
    np.testing.assert_array_equal(
        output["decoder_token_ids"], theirs.greedy(source, mask, token_ids)
    )


@pytest.mark.parametrize("name", divided(IMAGE_MODELS))
def test_image_models(name, tmp_path):
    theirs = IMAGE_MODELS[name]
    theirs.save(tmp_path)
    lm = theirs.load(models, tmp_path)
    mask = padding_mask([PROMPT_LENGTH, PROMPT_LENGTH - 7], PROMPT_LENGTH)
    expected = theirs.logits(IMAGES, TOKEN_IDS, mask)
    inputs = theirs.our_inputs(IMAGES, TOKEN_IDS, mask)
    full = to_numpy(compiled(lm)(inputs))[..., : expected.shape[-1]]
    real = mask.astype(bool)
    np.testing.assert_allclose(full[real], expected[real], **TOLERANCE)
    room = ((0, 0), (0, MAX_LENGTH - PROMPT_LENGTH))
    lm.compile(sampler="greedy")
    prompts = theirs.our_inputs(
        IMAGES,
        np.pad(TOKEN_IDS, room),
        np.pad(np.ones_like(TOKEN_IDS), room),
    )
    output = lm.generate(prompts, stop_token_ids=None)
    np.testing.assert_array_equal(
        output["token_ids"], theirs.greedy(IMAGES, TOKEN_IDS)
    )


@pytest.mark.parametrize("name", divided(GRID_MODELS))
def test_images_in_grids(name, tmp_path):
    theirs = GRID_MODELS[name]
    theirs.save(tmp_path)
    lm = theirs.load(models, tmp_path)
    mask = padding_mask([PROMPT_LENGTH, PROMPT_LENGTH - 5], PROMPT_LENGTH)
    expected = theirs.logits(TOKEN_IDS, mask)
    inputs = theirs.our_inputs(TOKEN_IDS, mask)
    inputs["position_ids"] = theirs.positions(TOKEN_IDS, mask)
    # What is computed of an image depends on its size, and is not compiled.
    embeddings = lm.backbone.embed(inputs)
    full = compiled(lm.backbone)(
        {
            "token_ids": TOKEN_IDS,
            "padding_mask": mask,
            "embeddings": to_numpy(embeddings),
            "position_ids": inputs["position_ids"],
        }
    )
    real = mask.astype(bool)
    logits = to_numpy(lm._logits(full))
    np.testing.assert_allclose(logits[real], expected[real], **TOLERANCE)
    room = ((0, 0), (0, MAX_LENGTH - PROMPT_LENGTH))
    lm.compile(sampler="greedy")
    token_ids = np.pad(TOKEN_IDS, room)
    mask = np.pad(np.ones_like(TOKEN_IDS), room)
    prompts = theirs.our_inputs(token_ids, mask)
    prompts["position_ids"] = theirs.positions(token_ids, mask)
    output = lm.generate(prompts, stop_token_ids=None)
    np.testing.assert_array_equal(
        output["token_ids"][:, PROMPT_LENGTH:], theirs.greedy(TOKEN_IDS)
    )
