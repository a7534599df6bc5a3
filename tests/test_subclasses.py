"""Subclasses of users load what is of their family, and what they saved."""

import keras
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from tests.families import deep_families
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import random_tokens
from tests.families import to_numpy

GPT2, LLAMA = FAMILIES[0], FAMILIES[3]
INPUTS = {"token_ids": random_tokens(2, 8), "padding_mask": np.ones((2, 8))}


def subclasses(family, package=None):
    """A user's backbone, a task on ours, and a task on the user's.

    Args:
        family: A `Family`.
        package: Optional str. Under which to register the three with Keras.
    """
    backbone = type("MyBackbone", (family.ours("Backbone"),), {})
    base = family.ours("CausalLM")
    task = type("Mine", (base,), {"answer": lambda self: 42})
    other = type("MineOnMine", (task,), {"backbone_cls": backbone})
    classes = backbone, task, other
    if package is not None:
        register = keras.saving.register_keras_serializable(package)
        classes = tuple(map(register, classes))
    return classes


@pytest.fixture(autouse=True)
def _as_registered_before():
    known = keras.saving.get_custom_objects()
    before = dict(known)
    yield
    for name in set(known) - set(before):
        del known[name]


def assert_same(loaded, expected):
    np.testing.assert_array_equal(
        to_numpy(loaded(INPUTS)), to_numpy(expected(INPUTS))
    )


@each_kind
def test_presets_of_the_family(family, tmp_path):
    ours, upstream = family.lm_pair
    backbone_cls, task_cls, other_cls = subclasses(family)
    ours.save_to_preset(tmp_path / "task")
    ours.backbone.save_to_preset(tmp_path / "backbone")
    presets = [tmp_path / "task", tmp_path / "backbone"]
    if not dict(family.config).get("tie_word_embeddings"):
        upstream.save_to_preset(tmp_path / "upstream")
        presets.append(tmp_path / "upstream")
    for preset in map(str, presets):
        lm = task_cls.from_preset(preset, preprocessor=None)
        assert type(lm) is task_cls and lm.answer() == 42
        assert type(lm.backbone) is family.ours("Backbone")
        assert_same(lm, ours)
        lm = other_cls.from_preset(preset, preprocessor=None)
        assert type(lm) is other_cls
        assert type(lm.backbone) is backbone_cls
        assert_same(lm, ours)
        backbone = backbone_cls.from_preset(preset)
        assert type(backbone) is backbone_cls
        assert_same(backbone, ours.backbone)
        # Nothing is remembered for others.
        plain = models.CausalLM.from_preset(preset, preprocessor=None)
        assert type(plain) is family.ours("CausalLM")
        assert type(plain.backbone) is family.ours("Backbone")


@deep_families
@pytest.mark.parametrize("package", [None, "mine"])
def test_what_they_save(family, package, tmp_path):
    """Unregistered classes are known to themselves and by `custom_objects`."""
    classes = backbone_cls, _, cls = subclasses(family, package)
    lm = cls(backbone_cls.from_config(family.pair[0].get_config()), None)
    lm.backbone.set_weights(family.pair[0].get_weights())
    lm.save_to_preset(tmp_path / "preset")
    lm.save(tmp_path / "lm.keras")
    lm.backbone.save(tmp_path / "backbone.keras")
    preset = str(tmp_path / "preset")
    loaded = [cls.from_preset(preset), backbone_cls.from_preset(preset)]
    for load in (keras_nlp_cache.load_model, keras.saving.load_model):
        for name in ("lm.keras", "backbone.keras"):
            path, known = tmp_path / name, {x.__name__: x for x in classes}
            if package is not None:
                loaded.append(load(path))
                continue
            loaded.append(load(path, custom_objects=known))
            with pytest.raises(TypeError, match="register_keras_serializable"):
                load(path)
    if package is not None:
        loaded.append(models.CausalLM.from_preset(preset))
        loaded.append(family.ours("CausalLM").from_preset(preset))
    else:
        with pytest.raises(ValueError, match="register_keras_serializable"):
            models.CausalLM.from_preset(preset)
    for model in loaded:
        expected = lm if isinstance(model, cls) else lm.backbone
        assert type(model) is type(expected)
        assert_same(model, expected)


def test_what_they_say_and_what_was_edited(tmp_path):
    lm = GPT2.text_lm()
    lm.save_to_preset(tmp_path / "preset")
    _, cls, _ = subclasses(GPT2)
    mine = cls.from_preset(str(tmp_path / "preset"))
    mine.compile(sampler="greedy")
    assert mine.generate("the fox", 12) == lm.generate("the fox", 12)
    edited = surgery.remove(mine, 0)
    assert type(edited) is cls
    edited.save_to_preset(tmp_path / "edited")
    loaded = cls.from_preset(str(tmp_path / "edited"))
    for model in (edited, loaded):
        model.compile(sampler="greedy")
    assert type(loaded) is cls
    assert len(loaded.backbone.blocks) == 1
    assert loaded.generate("the fox", 12) == edited.generate("the fox", 12)


def test_built_in_presets():
    for family in FAMILIES:
        backbone_cls, task_cls, _ = subclasses(family)
        assert task_cls.presets == family.upstream("CausalLM").presets
        assert backbone_cls.presets == family.upstream("Backbone").presets


def test_presets_of_another_family_are_refused(tmp_path):
    LLAMA.lm_pair[0].save_to_preset(tmp_path / "llama")
    llama = str(tmp_path / "llama")
    backbone_cls, task_cls, other_cls = subclasses(GPT2)
    for cls in (task_cls, other_cls):
        words = f"of a `GPT2Backbone` for `{cls.__name__}`"
        with pytest.raises(ValueError, match=f"{words}.*`LlamaBackbone`"):
            cls.from_preset(llama)
    with pytest.raises(ValueError, match="`MyBackbone`.*`LlamaBackbone`"):
        backbone_cls.from_preset(llama)
    # One that is no subclass of theirs, though of their family.
    sibling = type("Sibling", (GPT2.ours("Backbone"),), {})
    keras.saving.register_keras_serializable("mine")(sibling)
    sibling(**dict(GPT2.config)).save_to_preset(tmp_path / "sibling")
    with pytest.raises(ValueError, match="`MyBackbone`.*`Sibling`"):
        backbone_cls.from_preset(str(tmp_path / "sibling"))
    no_family = type("NoFamily", (models.CausalLM,), {})
    with pytest.raises(ValueError, match="`NoFamily`.*`LlamaBackbone`"):
        no_family.from_preset(llama)
