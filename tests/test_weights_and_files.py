"""Weights, files and presets are upstream's, and go both ways."""

import json
import re

import keras
import keras_hub
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache.graph.backbone import CachedBackbone
from tests import text
from tests.families import any_family
from tests.families import any_kind
from tests.families import compiled
from tests.families import decode
from tests.families import deep_suites
from tests.families import ENCODER_DECODERS
from tests.families import FAMILIES
from tests.families import GRID_MODELS
from tests.families import IMAGE_MODELS
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import randomize
from tests.families import to_numpy

TOKENS = random_tokens(2, 8)
MASK = padding_mask([5, 8], 8)
INPUTS = {"token_ids": TOKENS, "padding_mask": MASK}


def outputs(backbone, call=None):
    """All that a backbone returns, in one array, by a call that it is for."""
    family = next(
        x
        for x in (*FAMILIES, *ENCODER_DECODERS, *IMAGE_MODELS, *GRID_MODELS)
        if type(backbone).__name__ == f"{x.prefix}Backbone"
        and set(x.inputs(TOKENS, MASK)) >= {y.name for y in backbone.inputs}
    )
    returned = (call or backbone)(family.inputs(TOKENS, MASK))
    arrays = [to_numpy(x).ravel() for x in keras.tree.flatten(returned)]
    return np.concatenate(arrays)


@any_family
def test_is_a_drop_in_replacement(family):
    ours, upstream = family.pair
    assert isinstance(ours, family.upstream("Backbone"))
    assert isinstance(family.lm_pair[0], family.upstream(family.kind))
    assert isinstance(family.lm_pair[0], models.CausalLM)
    assert issubclass(family.ours(family.kind), keras_hub.models.CausalLM)
    assert set(upstream.get_config()) <= set(ours.get_config())


@any_family
def test_same_variables(family):
    ours, upstream = family.pair
    assert paths(ours) == paths(upstream)
    assert [w.shape for w in ours.weights] == [
        w.shape for w in upstream.weights
    ]
    ours, upstream = family.lm_pair
    assert paths(ours) == paths(upstream)


def paths(model):
    """Of the weights, without the numbers by which Keras counts layers.

    Upstream leaves some in its blocks unnamed, so they have another number in
    each model.
    """
    counted = (
        r"(_moe_block|t5_layer_norm|\w+_normalization|moonshine_\w+?"
        r"|vision_encoder|mobile_net_v5_backbone|edge_residual\w*"
        r"|conv_norm_act|conv2d|rms_norm2d)_\d+/"
    )
    return [re.sub(counted, r"\1/", w.path) for w in model.weights]


@on_one_backend("constructors are upstream's")
@any_family
def test_all_layers_have_the_dtype(family):
    backbone = family.ours("Backbone")(**family.arguments(dtype="bfloat16"))
    # One that was given as an argument has its own.
    tower = getattr(backbone, "vision_encoder", None)
    given = {id(x) for x in getattr(tower, "weights", ())}
    for weight in backbone.trainable_weights:
        assert weight.dtype == "bfloat16" or id(weight) in given, weight.path
    assert keras.config.dtype_policy().name == "float32"


@any_family
def test_same_outputs_without_a_cache(family):
    ours, upstream = family.pair
    # Where images are of any size, it has to be known.
    call = (lambda x: x) if family in GRID_MODELS else compiled
    np.testing.assert_array_equal(
        outputs(ours, call(ours)), outputs(upstream, call(upstream))
    )


# Names and shapes of the weights are compared for every family above.
@any_kind
def test_weights_files(family, tmp_path):
    assert_weights_go_both_ways(family, None, tmp_path)


@deep_suites
def test_weights_in_several_files(family, tmp_path):
    assert_weights_go_both_ways(family, 2e-5, tmp_path)


def assert_weights_go_both_ways(family, max_shard_size, folder):
    ours, upstream = family.pair
    suffix = ".weights.json" if max_shard_size else ".weights.h5"
    for source, target in (
        (ours, family.upstream("Backbone")(**dict(family.config))),
        (upstream, family.ours("Backbone")(**dict(family.config))),
    ):
        path = folder / f"{type(source).__module__}{id(source)}{suffix}"
        source.save_weights(path, max_shard_size=max_shard_size)
        target.load_weights(path)
        np.testing.assert_array_equal(outputs(target), outputs(source))


@deep_suites
def test_keras_files(family, tmp_path):
    ours, upstream = family.pair
    ours.save(tmp_path / "ours.keras")
    upstream.save(tmp_path / "upstream.keras")
    restored = keras.saving.load_model(tmp_path / "ours.keras")
    assert type(restored) is type(ours)
    # Upstream forgets that embeddings are tied, and cannot load such a file.
    tied = dict(family.config).get("tie_word_embeddings")
    for name in ("ours",) if tied else ("ours", "upstream"):
        loaded = keras_nlp_cache.load_model(tmp_path / f"{name}.keras")
        assert type(loaded) is type(ours)
        np.testing.assert_array_equal(outputs(loaded), outputs(ours))
        np.testing.assert_allclose(
            decode(loaded, TOKENS, (5, 3)),
            decode(ours, TOKENS, (5, 3)),
            atol=1e-6,
        )
    if not tied:
        plain = keras.saving.load_model(tmp_path / "upstream.keras")
        assert type(plain) is type(upstream)


@deep_suites
def test_keras_file_without_this_package(family, tmp_path, monkeypatch):
    """Where only keras_hub is installed our names are not registered."""
    ours, _ = family.pair
    ours.save(tmp_path / "ours.keras")
    registered = keras.saving.get_custom_objects()
    for name in [x for x in registered if x.startswith("keras_nlp_cache>")]:
        monkeypatch.delitem(registered, name)
    loaded = keras.saving.load_model(tmp_path / "ours.keras")
    assert type(loaded) is family.upstream("Backbone")
    if dict(family.config).get("tie_word_embeddings"):
        assert loaded.tie_word_embeddings
    np.testing.assert_array_equal(outputs(loaded), outputs(ours))


@any_kind
def test_backbone_presets(family, tmp_path):
    ours, upstream = family.pair
    ours.save_to_preset(tmp_path / "ours")
    files = list((tmp_path / "ours").iterdir())
    assert {file.suffix for file in files} == {".json", ".h5"}
    assert len({file.stat().st_mode for file in files}) == 1
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "ours"))
    assert type(loaded) is family.upstream("Backbone")
    family.as_trained(loaded)
    np.testing.assert_array_equal(outputs(loaded), outputs(ours))

    upstream.save_to_preset(tmp_path / "upstream")
    if dict(family.config).get("tie_word_embeddings"):
        # Upstream's config does not say so, and upstream cannot load it.
        config = json.loads((tmp_path / "upstream/config.json").read_text())
        config["config"]["tie_word_embeddings"] = True
        (tmp_path / "upstream/config.json").write_text(json.dumps(config))
    for name, cls in (
        ("ours", CachedBackbone),
        ("upstream", family.ours("Backbone")),
    ):
        loaded = cls.from_preset(str(tmp_path / name))
        assert type(loaded) is type(ours)
        np.testing.assert_array_equal(outputs(loaded), outputs(ours))


@deep_suites
def test_task_presets(family, tmp_path):
    preprocessor = family.preprocessor()
    tokenizer_size = preprocessor.tokenizer.vocabulary_size()
    backbone = family.backbone(vocabulary_size=tokenizer_size)
    ours = family.task(backbone, preprocessor)
    ours.compile(sampler="greedy")
    prompt = "the fox"
    expected = ours.generate(prompt, max_length=20)

    ours.save_to_preset(tmp_path / "ours")
    theirs = keras_hub.models.CausalLM.from_preset(str(tmp_path / "ours"))
    assert type(theirs) is family.upstream("CausalLM")
    theirs.compile(sampler="greedy")
    assert theirs.generate(prompt, max_length=20) == expected

    if not dict(family.config).get("tie_word_embeddings"):
        theirs.save_to_preset(tmp_path / "upstream")
    else:
        ours.save_to_preset(tmp_path / "upstream")
    for name in ("ours", "upstream"):
        for cls in (family.ours("CausalLM"), models.CausalLM):
            loaded = cls.from_preset(str(tmp_path / name))
            assert type(loaded) is type(ours)
            assert type(loaded.backbone) is type(backbone)
            loaded.compile(sampler="greedy")
            assert loaded.generate(prompt, max_length=20) == expected


def test_special_tokens_of_another_model(tmp_path):
    """Upstream forgets them, and cannot load what it saved of such a model."""
    family = next(x for x in FAMILIES if x.prefix == "Llama3")
    arguments = text.tokenizer_arguments("Llama3")
    arguments["vocabulary"] = {
        token.replace("<|", "<|im_"): i
        for token, i in arguments["vocabulary"].items()
    }

    def task(package):
        tokenizer = keras_hub.models.Llama3Tokenizer(
            **arguments,
            bos_token="<|im_begin_of_text|>",
            eos_token="<|im_end_of_text|>",
            misc_special_tokens={"<|im_eot_id|>"},
        )
        preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
            tokenizer, sequence_length=16
        )
        backbone = family.backbone(vocabulary_size=tokenizer.vocabulary_size())
        if package is keras_hub.models:
            backbone = family.upstream_backbone(
                backbone, vocabulary_size=tokenizer.vocabulary_size()
            )
        return package.Llama3CausalLM(backbone, preprocessor)

    task(keras_hub.models).save_to_preset(tmp_path / "upstream")
    with pytest.raises(ValueError, match="special token"):
        keras_hub.models.Llama3Tokenizer.from_preset(str(tmp_path / "upstream"))
    ours = task(models)
    ours.compile(sampler="greedy")
    expected = ours.generate("the fox", max_length=16)
    ours.save_to_preset(tmp_path / "ours")
    ours.save(tmp_path / "ours.keras")
    for loaded in (
        models.CausalLM.from_preset(str(tmp_path / "ours")),
        keras.saving.load_model(tmp_path / "ours.keras"),
    ):
        assert type(loaded) is type(ours)
        loaded.compile(sampler="greedy")
        assert loaded.generate("the fox", max_length=16) == expected
        tokenizer = loaded.preprocessor.tokenizer
        assert tokenizer.end_token == "<|im_end_of_text|>"
        assert tokenizer.special_token_000 == "<|im_eot_id|>"


@deep_suites
def test_task_keras_files(family, tmp_path):
    ours, upstream = family.lm_pair
    ours.save(tmp_path / "ours.keras")
    upstream.save(tmp_path / "upstream.keras")
    restored = keras.saving.load_model(tmp_path / "ours.keras")
    loaded = [restored]
    if not dict(family.config).get("tie_word_embeddings"):
        loaded.append(keras_nlp_cache.load_model(tmp_path / "upstream.keras"))
    for lm in loaded:
        assert type(lm) is type(ours)
        assert type(lm.backbone) is type(ours.backbone)
        np.testing.assert_array_equal(
            to_numpy(lm(INPUTS)), to_numpy(ours(INPUTS))
        )


@deep_suites
def test_building_leaves_upstreams_tasks_functional(family, monkeypatch):
    ours, upstream = family.lm_pair
    functional = type(keras.Model(ours.input, ours.output))
    family.task(ours.backbone, None)
    assert isinstance(upstream, functional)
    family.upstream_task(upstream.backbone, None)
    assert isinstance(ours, functional)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(models.CausalLM, "compile", lambda self: 1 / 0)
        family.task(ours.backbone, None)
    assert isinstance(upstream, functional)


def test_loading_leaves_keras_hub_alone(tmp_path):
    """Nothing that upstream loads becomes ours because we are imported."""
    family = FAMILIES[0]
    ours, upstream = family.pair
    ours.save_to_preset(tmp_path / "preset")
    family.ours("Backbone").from_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is family.upstream("Backbone")
    block = keras_hub.layers.TransformerDecoder(8, 2)
    assert type(block) is keras_hub.layers.TransformerDecoder
    assert not isinstance(upstream.transformer_layers[0], tuple)
    assert type(upstream.transformer_layers[0]) is type(block)


@deep_suites
def test_built_from_config(family):
    ours, _ = family.pair
    copy = type(ours).from_config(ours.get_config())
    assert type(copy) is type(ours)
    names = [x.name for x in ours.inputs]
    assert [x.name for x in copy.inputs] == names
    cache, same = (model.make_cache(2, 8) for model in (ours, copy))
    assert [k.shape for k, _ in cache] == [k.shape for k, _ in same]
    copy.set_weights(ours.get_weights())
    np.testing.assert_allclose(
        decode(copy, TOKENS, (5, 3)), decode(ours, TOKENS, (5, 3)), atol=1e-6
    )


@deep_suites
def test_dtype_of_the_weights(family):
    backbone = family.ours("Backbone")(**dict(family.config), dtype="bfloat16")
    randomize(backbone)
    cache = backbone.make_cache(1, 4)
    assert {
        keras.backend.standardize_dtype(x.dtype) for pair in cache for x in pair
    } == {"bfloat16"}
    output = backbone(INPUTS)
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"


def test_presets_are_upstreams():
    for family in FAMILIES:
        for kind in ("Backbone", "CausalLM"):
            assert family.ours(kind).presets == family.upstream(kind).presets
