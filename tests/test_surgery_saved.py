"""An edited model is saved as edited, or not loaded at all."""

import json

import keras
import keras_hub
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import dense
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import original
from tests.families import deep_suites
from tests.families import divided
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens


def assert_same(loaded, edited):
    assert type(loaded) is type(edited)
    assert [w.path for w in loaded.weights] == [w.path for w in edited.weights]
    assert not {id(w) for w in loaded.weights} & {id(w) for w in edited.weights}
    assert loaded.taps == edited.taps
    assert loaded.cache_spec == edited.cache_spec
    expected = full_forward(edited)
    np.testing.assert_allclose(full_forward(loaded), expected, atol=1e-5)
    np.testing.assert_allclose(
        cached_forward(loaded), expected, atol=2e-5, rtol=2e-4
    )


def several_edits(model):
    """One of each kind, on top of each other."""
    model = EDITS["add_lora"].apply(model)
    model = surgery.repeat_blocks(model, slice(0, 2))
    model = surgery.insert_after(model, [0, 3], dense)
    model = surgery.ablate_heads(model, 2, 1)
    model = surgery.add_attention_sink(model, 1)
    model = surgery.rewire(
        model,
        lambda layer, x, *args, **kwargs: (
            layer(x, *args, **kwargs) * 0.5 + 0.25
            if isinstance(layer, keras.layers.Dense)
            else layer(x, *args, **kwargs)
        ),
    )
    return surgery.tap(surgery.remove(model, -1), [0, -1])


@in_turn("edit", divided(EDITS))
def test_config(family, edit):
    edited = EDITS[edit].apply(original(family).backbone)
    config = json.loads(json.dumps(edited.get_config()))
    loaded = type(edited).from_config(config)
    loaded.set_weights(edited.get_weights())
    assert_same(loaded, edited)
    assert json.loads(json.dumps(loaded.get_config())) == config


@deep_suites
def test_keras_files(family, tmp_path):
    lm = several_edits(original(family))
    lm.save(tmp_path / "lm.keras")
    lm.backbone.save(tmp_path / "backbone.keras")
    for load in keras.saving.load_model, keras_nlp_cache.load_model:
        loaded = load(tmp_path / "lm.keras")
        assert type(loaded) is type(lm)
        assert_same(loaded.backbone, lm.backbone)
    assert_same(load(tmp_path / "backbone.keras"), lm.backbone)


@deep_suites
def test_presets(family, tmp_path):
    preprocessor = family.preprocessor()
    backbone = family.backbone(
        num_layers=BLOCKS,
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
    )
    lm = several_edits(family.task(backbone, preprocessor))
    lm.save_to_preset(tmp_path)
    lm.compile(sampler="greedy")
    expected = lm.generate("the fox", max_length=16)
    for cls in (models.CausalLM, type(lm)):
        loaded = cls.from_preset(str(tmp_path))
        loaded.compile(sampler="greedy")
        assert loaded.generate("the fox", max_length=16) == expected
    for cls in (type(backbone), keras_nlp_cache.graph.backbone.CachedBackbone):
        loaded = cls.from_preset(str(tmp_path))
        np.testing.assert_allclose(
            full_forward(loaded, random_tokens(1, 8) % 20),
            full_forward(lm.backbone, random_tokens(1, 8) % 20),
            atol=1e-5,
        )
    # Upstream's classes would build the model as if it had not been edited.
    for cls in (
        keras_hub.models.CausalLM,
        family.upstream("CausalLM"),
        keras_hub.models.Backbone,
        family.upstream("Backbone"),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            cls.from_preset(str(tmp_path))
        assert "Edited with keras_nlp_cache.surgery" in str(error.value)


@deep_suites
def test_where_only_upstream_is_installed(family, tmp_path, monkeypatch):
    lm = EDITS["insert_after"].apply(original(family))
    lm.save(tmp_path / "lm.keras")
    lm.backbone.save(tmp_path / "backbone.keras")
    config = lm.backbone.get_config()
    registered = keras.saving.get_custom_objects()
    for name in [x for x in registered if x.startswith("keras_nlp_cache>")]:
        monkeypatch.delitem(registered, name)
    for name in ("lm.keras", "backbone.keras"):
        with pytest.raises(TypeError, match="Edited with keras_nlp_cache"):
            keras.saving.load_model(tmp_path / name)
    with pytest.raises(TypeError, match="outputs"):
        family.upstream("Backbone").from_config(config)


@deep_suites
def test_weights_files(family, tmp_path):
    edited = several_edits(original(family)).backbone
    edited.save_weights(tmp_path / "edited.weights.h5")
    loaded = type(edited).from_config(edited.get_config())
    loaded.load_weights(tmp_path / "edited.weights.h5")
    assert_same(loaded, edited)


@deep_suites
def test_layers_are_shared_again(family):
    """A layer that is called twice, and one inside another, are one each."""
    backbone = surgery.repeat_blocks(original(family).backbone, 0)
    edited = surgery.add_lora(backbone, 1, 2)
    loaded = type(edited).from_config(edited.get_config())
    first, second = loaded.blocks[:2]
    assert first is not second
    attention = [getattr(x, x.attention_name) for x in (first, second)]
    name = attention[0].projections["query"]
    query = [getattr(x, name) for x in attention]
    assert query[1].projection is query[0]
    assert len(loaded.weights) == len(edited.weights)


@deep_suites
def test_edited_again_after_loading(family):
    edited = several_edits(original(family).backbone)
    loaded = type(edited).from_config(edited.get_config())
    loaded.set_weights(edited.get_weights())
    again = [
        surgery.insert_after(
            model, 0, keras.layers.Rescaling(0.5, name="rescaling")
        )
        for model in (loaded, edited)
    ]
    assert_same(*again)


@deep_suites
def test_another_dtype(family, tmp_path):
    """Inserted layers follow when a preset is loaded in another dtype."""
    edited = several_edits(original(family).backbone)
    edited.save_to_preset(tmp_path)
    loaded = type(edited).from_preset(str(tmp_path), dtype="bfloat16")
    assert {
        keras.backend.standardize_dtype(w.dtype) for w in loaded.weights
    } == {"bfloat16"}
    expected = full_forward(edited)
    error = np.std(full_forward(loaded) - expected)
    assert 0 < error < 0.2 * np.std(expected)


@each_kind
def test_not_edited(family):
    """A model that was not edited is saved as before."""
    assert "outputs" not in original(family).backbone.get_config()


@deep_suites
def test_cloned(family):
    edited = several_edits(original(family).backbone)
    clone = keras.models.clone_model(edited)
    inputs = {
        "token_ids": random_tokens(2, 8),
        "padding_mask": padding_mask([8, 8], 8),
    }
    assert clone(inputs).shape == edited(inputs)[0].shape


def test_export_to_transformers_is_refused(tmp_path):
    edited = surgery.remove(original(FAMILIES[0]), 0)
    for model in (edited, edited.backbone):
        with pytest.raises(ValueError, match="edited"):
            model.export_to_transformers(str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()
