"""Models with an encoder are quantized, saved and looked into as others are."""

import keras_hub
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from tests.families import ENCODER_DECODERS
from tests.families import every_encoder_decoder
from tests.families import on_one_backend
from tests.families import SOUND
from tests.families import to_numpy
from tests.test_encoder_decoder import assert_greedy_after
from tests.test_encoder_decoder import cached_forward
from tests.test_encoder_decoder import full_forward
from tests.test_encoder_decoder import prompts_for
from tests.test_encoder_decoder import prompts_of
from tests.test_encoder_decoder import TOKENS


def greedy(lm, prompts):
    lm.compile(sampler="greedy")
    return np.asarray(
        lm.generate(prompts, stop_token_ids=None)["decoder_token_ids"]
    )


# === Quantized ===


@every_encoder_decoder
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized(family, mode, tmp_path):
    ours = family.task(family.backbone())
    upstream = family.upstream_task(family.upstream_backbone(ours.backbone))
    before = full_forward(ours.backbone)
    for lm in (ours, upstream):
        lm.quantize(mode)
    full = full_forward(ours.backbone)
    error = np.abs(full - before).max()
    assert error > 1e-3
    theirs = upstream.backbone(family.inputs(TOKENS, np.ones_like(TOKENS)))
    theirs = to_numpy(ours.backbone.hidden_states_of(theirs))
    np.testing.assert_allclose(full, theirs, atol=1e-4, rtol=1e-3)
    # Rows of what is called are rounded each for itself.
    cached = cached_forward(ours.backbone)
    assert np.abs(cached - full).max() <= max(0.3 * error, 1e-4)
    prompts = prompts_for(family)
    generated = greedy(ours, prompts)
    if mode == "int8":
        np.testing.assert_array_equal(generated, greedy(upstream, prompts))
    else:
        # What is called on is not rounded. Upstream's T5Gemma 2 raises.
        answers = {"decoder_token_ids": generated}
        assert_greedy_after(prompts, answers, ours)
    if family.prefix == "Moonshine":
        return  # It takes names of dtypes, which do not say what is quantized.
    ours.backbone.save(tmp_path / "quantized.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "quantized.keras")
    np.testing.assert_allclose(full_forward(loaded), full, atol=1e-4)


@on_one_backend("what is refused is said")
@every_encoder_decoder
def test_what_no_step_and_no_calibration_can_be_made_of(family):
    lm, _ = family.lm_pair
    with pytest.raises(ValueError, match="reads what an encoder returned"):
        lm.get_quantization_layer_structure("gptq")
    for model in (lm, lm.backbone):
        with pytest.raises(ValueError, match=r"without an encoder.*generate\("):
            keras_nlp_cache.StepModel(model, batch_size=1, max_length=8)


NO_SOUND = {
    "several channels": lambda x: np.stack([x, x], axis=1)[None],
    "a rank too many": lambda x: x[None, None, :, None],
    "no rank": lambda x: x[0],
    "integers": lambda x: (x * 1000).astype("int16"),
    "a file": lambda x: "fox.wav",
    "a rate beside it": lambda x: {"array": x, "sampling_rate": 8000},
    "rows of different lengths": lambda x: [x, x[:99]],
}


@on_one_backend("what is refused is said")
@pytest.mark.parametrize("name", NO_SOUND)
def test_what_is_no_sound(name):
    family = next(x for x in ENCODER_DECODERS if x.source is SOUND)
    lm = family.text_lm()
    audio = NO_SOUND[name](SOUND["encoder_input_values"][0, :, 0])
    for method in (lm.generate, lambda x: list(lm.stream(x))):
        with pytest.raises(ValueError, match="`audio`.*16000.*Received: "):
            method({"audio": audio})


# === Presets ===


@every_encoder_decoder
def test_task_presets(family, tmp_path):
    *_, prompt = prompts_of(family)
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    ours = family.task(family.backbone(vocabulary_size=size), preprocessor)

    def said(lm):
        # Upstream's config of a preprocessor does not say how long.
        for side in ("encoder", "decoder"):
            if hasattr(lm.preprocessor, f"{side}_sequence_length"):
                setattr(lm.preprocessor, f"{side}_sequence_length", 16)
        lm.compile(sampler="greedy")
        return lm.generate(prompt, max_length=9)

    expected = said(ours)
    ours.save_to_preset(tmp_path / "ours")
    # Without a dtype, upstream cannot load what it saved of Moonshine, either.
    theirs = keras_hub.models.Seq2SeqLM.from_preset(
        str(tmp_path / "ours"), dtype="float32"
    )
    assert type(theirs) is family.upstream(family.kind)
    family.as_trained(theirs.backbone)
    assert said(theirs) == expected
    theirs.save_to_preset(tmp_path / "upstream")
    for name, cls in (
        ("ours", models.Seq2SeqLM),
        ("upstream", models.CausalLM),
        ("upstream", family.ours(family.kind)),
    ):
        loaded = cls.from_preset(str(tmp_path / name), dtype="float32")
        assert type(loaded) is type(ours)
        assert type(loaded.backbone) is type(ours.backbone)
        for x, y in zip(loaded.weights, ours.weights, strict=True):
            np.testing.assert_array_equal(to_numpy(x), to_numpy(y))
    assert said(loaded) == expected


# === Looked into, and steered ===


@every_encoder_decoder
def test_taps(family):
    backbone, _ = family.pair
    returned = {}

    def call(site, *args, **kwargs):
        x = site(*args, **kwargs)
        if site.encoder_block == 0 or site.block == 1:
            returned[site.name] = x
        return x

    inputs = {"decoder_token_ids": TOKENS, **family.source}
    backbone.intercepted(inputs, call)
    tapped = surgery.tap(backbone, ["encoder.0", "decoder.-1"])
    _, taps = tapped(inputs)
    sites = list(returned)
    assert list(taps) == sites and len(sites) == 2
    for name in sites:
        np.testing.assert_allclose(
            to_numpy(taps[name]), to_numpy(returned[name]), atol=1e-5
        )
    # With a cache, each is there when it is computed.
    cache = tapped.make_cache(2, 8)
    first = {**inputs, "decoder_token_ids": TOKENS[:, :5]}
    _, cache, taps_before = tapped(
        {**first, "cache": cache, "cache_update_index": 0}
    )
    _, _, taps_after = tapped(
        {
            "decoder_token_ids": TOKENS[:, 5:],
            "cache": cache,
            "cache_update_index": 5,
        }
    )
    of_encoder, of_decoder = sites
    assert list(taps_before) == list(taps_after) == sites
    assert taps_after[of_encoder] is None
    np.testing.assert_allclose(
        to_numpy(taps_before[of_encoder]),
        to_numpy(taps[of_encoder]),
        atol=1e-5,
    )
    both = [to_numpy(x[of_decoder]) for x in (taps_before, taps_after)]
    np.testing.assert_allclose(
        np.concatenate(both, axis=1), to_numpy(taps[of_decoder]), atol=1e-4
    )


@every_encoder_decoder
def test_both_sides_are_steered_while_it_generates(family):
    prompts = prompts_for(family)
    lm, _ = family.lm_pair
    before = greedy(lm, prompts)
    rng = np.random.default_rng(0)
    steered = lm
    for side in ("encoder", "decoder"):
        (site,) = surgery.select(lm, f"{side}.-1")
        vector = surgery.ControlVector(
            {1: rng.normal(size=site.shape[-1])},
            model_hint=family.prefix.lower(),
        )
        steered = vector.apply(steered, strength=3.0, side=side, name=side)
    tapped = surgery.tap(steered, "decoder.0")
    generated = greedy(tapped, prompts)
    assert (generated != before).any()
    assert_greedy_after(prompts, {"decoder_token_ids": generated}, steered)
    # Each with a strength of its own.
    for side in ("encoder", "decoder"):
        steered.backbone.get_layer(side).strength.assign(0.0)
    np.testing.assert_array_equal(greedy(steered, prompts), before)


@on_one_backend("what is refused is said")
@every_encoder_decoder
def test_where_an_encoder_is_steered(family):
    lm, _ = family.lm_pair
    (site,) = surgery.select(lm, "encoder.0")
    vector = surgery.ControlVector(
        {1: np.ones(site.shape[-1])}, model_hint=family.prefix.lower()
    )
    with pytest.raises(ValueError, match="encoder, which generates nothing"):
        vector.apply(lm, side="encoder", generated_only=True)
    with pytest.raises(ValueError, match='"decoder", or "encoder".*\'middle\''):
        vector.apply(lm, side="middle")
    with pytest.raises(ValueError, match="at most the 2 encoder blocks"):
        surgery.ControlVector(
            {2: np.ones(site.shape[-1])}, model_hint=family.prefix.lower()
        ).apply(lm, side="encoder")
    # What is the same in all places, a norm takes away.
    direction = np.random.default_rng(0).normal(size=_width(lm))
    only = surgery.ControlVector(
        {1: direction},
        model_hint=family.prefix.lower(),
    ).apply(lm, strength=9.0, generated_only=True)
    prompts = prompts_for(family)
    assert (greedy(only, prompts) != greedy(lm, prompts)).any()
    np.testing.assert_array_equal(
        full_forward(only.backbone), full_forward(lm.backbone)
    )


def _width(lm):
    (site,) = surgery.select(lm, "decoder.0")
    return site.shape[-1]
