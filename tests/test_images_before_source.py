"""An encoder reads an image before its text, once, or text alone."""

import keras
import numpy as np
import pytest

from keras_nlp_cache import surgery
from tests.families import ENCODER_DECODERS
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import SOURCE
from tests.families import to_numpy
from tests.test_encoder_decoder import assert_greedy_after
from tests.test_encoder_decoder import cached_forward
from tests.test_encoder_decoder import full_forward
from tests.test_encoder_decoder import MASK
from tests.test_encoder_decoder import prompts_for
from tests.test_encoder_decoder import TEXTS
from tests.test_encoder_decoder import TOKENS

(FAMILY,) = (x for x in ENCODER_DECODERS if x.name == "blip2_t5")


def without_images(backbone):
    """The same, made without a tower."""
    plain = FAMILY.without_images().backbone
    layers = "vision_encoder", "qformer", "language_projection"
    sees = {id(w) for x in layers for w in getattr(backbone, x).weights}
    weights = [x for x in backbone.weights if id(x) not in sees]
    for x, y in zip(plain.weights, weights, strict=True):
        x.assign(y)
    return plain


def test_text_alone():
    backbone, upstream = FAMILY.pair
    full = full_forward(backbone, **SOURCE)
    plain = without_images(backbone)
    np.testing.assert_allclose(
        full_forward(plain, **SOURCE), full, atol=1e-5, rtol=1e-5
    )
    np.testing.assert_allclose(
        cached_forward(backbone, **SOURCE), full, atol=1e-4, rtol=1e-4
    )
    # Not what it says of an image.
    assert np.abs(full - full_forward(backbone)).max() > 1e-2
    lm, upstream = FAMILY.lm_pair
    for x in (lm, upstream):
        x.compile(sampler="greedy")
    prompts = {**SOURCE, **TEXTS}
    generated, expected = (
        x.generate(dict(prompts), stop_token_ids=None)["decoder_token_ids"]
        for x in (lm, upstream)
    )
    np.testing.assert_array_equal(generated, to_numpy(expected))
    # Some with images and some without, and one at a time.
    rows = [
        {name: x[0] for name, x in source.items() if "decoder_p" not in name}
        for source in (prompts, {**prompts, "images": IMAGES})
    ]
    for row in rows:
        row["decoder_token_ids"] = row["decoder_token_ids"][:2]
    found = dict(lm.generate_many(rows, 4, batch_size=2, stop_token_ids=None))
    with_image = lm.generate(prompts_for(FAMILY), stop_token_ids=None)
    np.testing.assert_array_equal(found[0], generated[0, :6])
    np.testing.assert_array_equal(
        found[1], with_image["decoder_token_ids"][0, :6]
    )


@on_one_backend("what is called is counted")
def test_what_sees_runs_once(monkeypatch):
    lm = FAMILY.task(FAMILY.backbone())
    lm.compile(sampler="greedy", run_eagerly=True)
    layers, calls = FAMILY.of_images_alone(lm.backbone), []
    for layer in layers:
        call = layer.call

        def counted(*args, call=call, name=layer.name, **kwargs):
            calls.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(layer, "call", counted)
    generated = lm.generate(prompts_for(FAMILY), stop_token_ids=None)
    assert sorted(calls) == sorted(x.name for x in layers)
    assert_greedy_after(prompts_for(FAMILY), generated, lm)
    # No step reads their weights, nor those of the encoder.
    unread = {id(x) for x in lm.backbone.prefill_layers}
    assert unread >= {id(x) for x in (*layers, *lm.backbone.encoder_blocks)}
    assert not unread & {id(x) for x in lm.backbone.blocks}
    assert id(lm.backbone.token_embedding) not in unread


@on_one_backend("what is refused is said")
def test_edits_where_it_is_joined():
    backbone, _ = FAMILY.pair
    (joined,) = (
        x
        for x in surgery.select(backbone, "joined_source_*")
        if x.shape[-1] == 32
    )
    edited = surgery.insert_after(
        backbone, joined.name, keras.layers.Rescaling(-2.0)
    )
    for source in (SOURCE, FAMILY.source):
        full = full_forward(edited, **source)
        np.testing.assert_allclose(
            cached_forward(edited, **source), full, atol=1e-4, rtol=1e-3
        )
        before = full_forward(backbone, **source)
        assert np.abs(full - before).max() > 1e-2
    with pytest.raises(ValueError, match=f"{joined.name}'.*text goes on alone"):
        surgery.insert_before(
            backbone, joined.name, keras.layers.Rescaling(-2.0)
        )


@on_one_backend("what is refused is said")
def test_what_is_refused():
    lm = FAMILY.text_lm()
    words = "the quick fox"
    for inputs, message in (
        ({"images": IMAGES}, "`encoder_text`, a string.*\\['images'\\]"),
        (
            {"images": IMAGES[0, 0], "encoder_text": words},
            r"shapes \[\(16, 3\)",
        ),
        ({"images": "fox.png", "encoder_text": words}, r"shapes \[\(\)\]"),
        (
            {"images": IMAGES[..., :1], "encoder_text": [words] * 2},
            r"\(height, width, 3\).*\(16, 16, 1\)",
        ),
        (
            {"images": IMAGES, "encoder_text": [words]},
            r"`images` of shape \(1, 16.*\(2, 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate(inputs)
    with pytest.raises(ValueError, match="`encoder_text`"):
        lm.start_session(prompt={"images": IMAGES[0]})
    plain = FAMILY.without_images()
    with pytest.raises(ValueError, match="without a `vision_encoder`"):
        plain.generate(prompts_for(FAMILY), stop_token_ids=None)
    text = {"decoder_token_ids": TOKENS, "decoder_padding_mask": MASK}
    with pytest.raises(ValueError, match="unknown key: 'images'"):
        plain.backbone({**text, **FAMILY.source})
    with pytest.raises(ValueError, match="reads them: call `encode"):
        lm.backbone.encode_images(IMAGES)
    opt = FAMILY.ours("CausalLM")
    with pytest.raises(ValueError, match="without an encoder, for a `BLIP2C"):
        opt(backbone=lm.backbone, preprocessor=None)
