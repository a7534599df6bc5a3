"""Quantized models generate, and as upstream's do."""

import gc

import keras
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from keras_nlp_cache.quantization.logits import mend_quantized
from tests.families import decode
from tests.families import deep_families
from tests.families import deep_suites
from tests.families import divided
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

TOKENS = random_tokens(2, 8)
INPUTS = {"token_ids": TOKENS, "padding_mask": TOKENS > 0}
PROMPTS = {
    "token_ids": random_tokens(2, 16) * padding_mask([4, 9], 16),
    "padding_mask": padding_mask([4, 9], 16),
}
MODES = ["int8", "int4", "float8", "gptq", "awq"]
NARROW = {"hidden_dim": 16, "intermediate_dim": 16, "head_dim": 4}


class Numbers:
    """A tokenizer for calibration data that is token ids already."""

    def tokenize(self, text):
        return np.array([[int(x) for x in text.split()]])

    __call__ = tokenize


def calibrated(mode, vocabulary_size):
    config = {
        "gptq": keras.quantizers.GPTQConfig,
        "awq": keras.quantizers.AWQConfig,
    }[mode]
    rng = np.random.default_rng(0)
    return config(
        dataset=[" ".join(map(str, rng.integers(1, vocabulary_size, 64)))],
        tokenizer=Numbers(),
        num_samples=1,
        sequence_length=8,
        group_size=8,
        weight_bits=4,
    )


def quantize(lm, mode):
    if mode in ("gptq", "awq"):
        size = lm.backbone.token_embedding.input_dim
        lm.quantize(mode, config=calibrated(mode, size))
    else:
        lm.quantize(mode)
    return lm


def full(lm):
    return to_numpy(lm.backbone(INPUTS))


def computes(backbone):
    try:
        backbone(INPUTS)
    except Exception as e:
        # TensorFlow's addition and PyTorch's product want one dtype.
        assert "dtype" in str(e) or "float tensor" in str(e)
        return False
    return True


def lms(family, **config):
    """Models of ours and of upstream, to be changed.

    They are narrow, since GPTQ goes column by column, and JAX compiles what it
    does for each.
    """
    known = dict(family.config)
    config = {x: NARROW[x] for x in NARROW if x in known} | config
    ours = family.backbone(**config)
    upstream = family.upstream_backbone(ours, **config)
    return (
        family.task(ours, None),
        family.upstream_task(upstream, None),
    )


def greedy(lm):
    lm.compile(sampler="greedy")
    return lm.generate(PROMPTS, stop_token_ids=None)["token_ids"]


@deep_suites
@pytest.mark.parametrize("mode", MODES[:2])
def test_as_upstream(family, mode):
    assert_as_upstream(family, mode)


@in_turn("mode", ["gptq", "awq", "float8"])
def test_as_upstream_in_other_modes(family, mode):
    assert_as_upstream(family, mode)


def assert_as_upstream(family, mode):
    ours, upstream = lms(family)
    before = full(ours)
    for lm in (ours, upstream):
        quantize(lm, mode)
    x = full(ours)
    error = np.abs(x - before).max()
    assert error > 1e-4
    # With its blocks in the same order and calibrated with the same data.
    np.testing.assert_allclose(x, full(upstream), atol=1e-3, rtol=1e-3)
    # What is rounded depends on what is in the call, in int8 by row and in
    # float8 by tensor; beyond that, a cache changes nothing.
    cached = decode(ours.backbone, TOKENS, (5, 1, 2))
    assert np.abs(cached - x).max() <= max(0.3 * error, 1e-4)
    generated = greedy(ours)
    kept = PROMPTS["padding_mask"].astype(bool)
    np.testing.assert_array_equal(generated[kept], PROMPTS["token_ids"][kept])
    np.testing.assert_array_equal(generated, greedy(upstream))


def text_lm(family):
    """A task with a preprocessor that was not called yet."""
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    known = dict(family.config)
    config = {x: NARROW[x] for x in NARROW if x in known}
    backbone = family.backbone(**config, vocabulary_size=size)
    return family.task(backbone, preprocessor)


def generated(lm):
    lm.compile(sampler="greedy")
    return lm.generate("the fox", max_length=12)


@in_turn("mode", divided(MODES))
def test_with_a_preprocessor(family, mode, tmp_path):
    lm = text_lm(family)
    backbone = family.ours("Backbone").from_config(lm.backbone.get_config())
    backbone.set_weights(lm.backbone.get_weights())
    alone = family.task(backbone, None)
    for model in (lm, alone):
        quantize(model, mode)
    tokens = {"token_ids": TOKENS % lm.backbone.token_embedding.input_dim}
    np.testing.assert_allclose(
        to_numpy(lm.backbone(tokens)),
        to_numpy(alone.backbone(tokens)),
        atol=1e-6,
    )
    text = generated(lm)
    assert text.startswith("the fox")
    if mode not in ("gptq", "awq"):  # Keras does not load files of these.
        lm.save(tmp_path / "lm.keras")
        loaded = keras.saving.load_model(tmp_path / "lm.keras")
        assert generated(loaded) == text


def test_filters_with_a_preprocessor():
    """Whatever Keras takes, as a filter or as a configuration."""
    config = keras.quantizers.Int8QuantizationConfig()
    for filters in ("gate", ["gate"], lambda layer: "gate" in layer.name):
        lm = text_lm(FAMILIES[3])
        lm.quantize(config=config, filters=filters)
        modes = {
            layer.name: layer.quantization_mode
            for layer in lm.backbone._flatten_layers()
            if getattr(layer, "quantization_mode", None)
        }
        assert modes == {"feedforward_gate_dense": "int8"}
    with pytest.raises(ValueError, match="`filters` argument must be"):
        text_lm(FAMILIES[3]).quantize("int8", filters=3)


@pytest.mark.parametrize("mode", divided(MODES))
def test_an_edited_model(mode):
    """The edit is part of what is calibrated and of what is quantized."""
    lm = lms(FAMILIES[3])[0]
    inserted = keras.layers.Dense(16, name="inserted")
    edited = surgery.insert_after(lm, 0, inserted)
    expected = full(edited)
    quantize(edited, mode)
    inserted = edited.backbone.get_layer("inserted")
    assert inserted.quantization_mode == mode
    if mode in ("gptq", "awq"):
        # These lose a random model of this size altogether, upstream's too.
        assert getattr(inserted, f"is_{mode}_calibrated")
    else:
        x = full(edited)
        assert np.corrcoef(x.ravel(), expected.ravel())[0, 1] > 0.9
    assert greedy(edited).shape == (2, 16)


@each_kind
def test_layer_structure_is_the_model(family):
    """Layers that are called in turn make of tokens what the model does."""
    lm = family.lm_pair[0]
    outputs = []

    def call(site, *args, **kwargs):
        x = site(*args, **kwargs)
        if site.block is not None:
            outputs.append(x)
        return x

    if any(block.carries for block in lm.backbone.blocks):
        # What one block computes of keys or values, others read.
        with pytest.raises(ValueError, match="which reads .* of the block"):
            lm.get_quantization_layer_structure("gptq")
        return
    lm.backbone.intercepted({"token_ids": TOKENS}, call)
    structure = lm.get_quantization_layer_structure("gptq")
    (prepare,) = structure["pre_block_layers"]
    x = prepare(ops.convert_to_tensor(TOKENS))
    for layer in structure["sequential_blocks"]:
        x = layer(x)
    np.testing.assert_allclose(to_numpy(x), to_numpy(outputs[-1]), atol=1e-5)


# Upstream's leaves positions, norms and scales out for some of the others.
@deep_families
def test_layer_structure(family):
    ours, upstream = family.lm_pair
    assert ours.get_quantization_layer_structure("int8") is None
    for mode in ("gptq", "awq"):
        structure = ours.get_quantization_layer_structure(mode)
        expected = upstream.get_quantization_layer_structure(mode)
        assert structure["sequential_blocks"] == ours.backbone.blocks
        (prepare,) = structure["pre_block_layers"]
        (upstreams,) = expected["pre_block_layers"]
        tokens = ops.convert_to_tensor(TOKENS)
        np.testing.assert_allclose(
            to_numpy(prepare(tokens)), to_numpy(upstreams(tokens)), atol=1e-6
        )


def test_a_graph_that_is_no_chain():
    lm = lms(FAMILIES[3])[0]

    def skip(layer, *args, **kwargs):
        x = layer(*args, **kwargs)
        if layer is lm.backbone.blocks[0]:
            return keras.layers.Add(name="skip")([x, args[0]])
        return x

    edited = surgery.rewire(lm, skip)
    with pytest.raises(ValueError, match=r"'skip' that takes.*int8"):
        edited.get_quantization_layer_structure("gptq")
    quantize(edited, "int8")
    assert greedy(edited).shape == (2, 16)


@deep_suites
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_files(family, mode, tmp_path):
    """A quantized backbone saved by us or by upstream, loaded by either.

    Presets of quantized models are another matter: upstream's loader asks for
    the weights as they were. Nor does upstream say that a Llama is tied.
    """
    config = dict(family.config)
    untied = {name: False for name in config if name.startswith("tie_")}
    ours, upstream = lms(family, **untied)
    for lm in (ours, upstream):
        quantize(lm, mode)
        path = tmp_path / "model.keras"
        lm.backbone.save(path)
        for load, kind in (
            (keras_nlp_cache.load_model, family.ours("Backbone")),
            (keras.saving.load_model, type(lm.backbone)),
        ):
            loaded = load(path)
            assert type(loaded) is kind
            np.testing.assert_allclose(
                to_numpy(loaded(INPUTS)), full(lm), atol=1e-5, rtol=1e-4
            )


@deep_suites
def test_adapters(family, tmp_path):
    """LoRA: generated with, saved, merged into the kernels by quantizing."""
    ours, upstream = lms(family)
    first = greedy(ours)
    for lm in (ours, upstream):
        lm.backbone.enable_lora(2)
        rng = np.random.default_rng(0)
        for weight in lm.backbone.trainable_variables:
            if "lora" not in weight.name:
                continue
            weight.assign(0.4 * rng.normal(size=weight.shape))
    adapted = full(ours)
    np.testing.assert_allclose(adapted, full(upstream), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(
        decode(ours.backbone, TOKENS, (5, 1, 2)), adapted, atol=1e-4, rtol=1e-4
    )
    generated = greedy(ours)
    assert (generated != first).any()
    np.testing.assert_array_equal(generated, greedy(upstream))

    path = str(tmp_path / "adapters.lora.h5")
    ours.backbone.save_lora_weights(path)
    fresh = lms(family)[1].backbone
    fresh.load_lora_weights(path)
    np.testing.assert_allclose(
        to_numpy(fresh(INPUTS)), adapted, atol=1e-5, rtol=1e-4
    )
    # Saving without adapters merges them.
    ours.save_weights(tmp_path / "merged.weights.h5")
    merged = lms(family)[0]
    merged.load_weights(tmp_path / "merged.weights.h5")
    np.testing.assert_allclose(full(merged), adapted, atol=1e-4, rtol=1e-3)
    np.testing.assert_array_equal(greedy(merged), generated)


@deep_suites
@pytest.mark.parametrize("layers", ["token_embedding", ".*(layer|block)_1.*"])
def test_a_policy_for_each_layer(family, layers):
    """Some layers in bfloat16, the rest in float32."""
    exact = family.pair[0]
    policies = keras.dtype_policies.DTypePolicyMap(
        default_policy="float32",
        policy_map={layers: keras.DTypePolicy("mixed_bfloat16")},
    )
    backbone = family.backbone(dtype=policies)
    backbone.set_weights(exact.get_weights())
    upstream = family.upstream_backbone(backbone, dtype=policies)
    if not computes(backbone):
        assert not computes(upstream)
        pytest.skip("upstream's blocks want inputs of their own dtype here")
    of_block = backbone.blocks[1].compute_dtype
    assert of_block == ("float32" if "token" in layers else "bfloat16")
    cached = decode(backbone, TOKENS, (5, 1, 2))
    np.testing.assert_allclose(
        cached, to_numpy(backbone(INPUTS)), atol=0.1, rtol=0.05
    )
    assert np.abs(cached - to_numpy(exact(INPUTS))).max() > 1e-4
    # Upstream's cache is of one dtype, and its `generate()` may fail here.
    assert greedy(family.task(backbone, None)).shape == (2, 16)


def test_a_quantized_draft():
    """It guesses for the model that it was made from."""
    lm, _ = lms(FAMILIES[3])
    draft = quantize(lms(FAMILIES[3])[0], "int8")
    draft.compile(sampler="greedy")
    expected = greedy(lm)
    result = lm.generate(PROMPTS, stop_token_ids=None, assistant_model=draft)
    np.testing.assert_array_equal(result["token_ids"], expected)


def test_garbage_is_collected_lightly(monkeypatch):
    """Over what is made while quantizing, not over all that is imported."""
    frozen, collect = [], gc.collect
    monkeypatch.setattr(
        gc, "collect", lambda: (frozen.append(gc.get_freeze_count()), collect())
    )
    kept = gc.get_freeze_count()  # The suite's own.
    gc.unfreeze()
    lm = FAMILIES[0].task(FAMILIES[0].backbone(), None)
    lm.quantize("int8")
    assert len(frozen) > 2 and all(frozen[1:])
    assert gc.get_freeze_count() == 0
    if kept:
        gc.freeze()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_preset_in_another_dtype(mode, tmp_path):
    lm = text_lm(FAMILIES[3])
    lm.quantize(mode)
    lm.save_to_preset(tmp_path / "preset")
    expected = generated(lm)
    for dtype in ("float32", "bfloat16", keras.DTypePolicy("float32")):
        loaded = type(lm).from_preset(str(tmp_path / "preset"), dtype=dtype)
        name = keras.dtype_policies.get(dtype).name
        assert loaded.backbone.compute_dtype == name
        dense = loaded.backbone.transformer_layers[0]._feedforward_gate_dense
        assert dense.quantization_mode == mode
        if name == "float32":
            assert generated(loaded) == expected


@pytest.mark.parametrize("block_size", [None, 16, 7])
@pytest.mark.parametrize("rank", [0, 4])
def test_embeddings_of_tokens_alone_are_unpacked(block_size, rank, monkeypatch):
    config = keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    layer = keras.layers.ReversibleEmbedding(50, 33)
    layer.build()
    layer.quantize(config=config)
    if rank:
        layer.enable_lora(rank, b_initializer="normal")
    expected = to_numpy(layer(TOKENS % 50))
    mend_quantized(layer)
    unpacked = []
    unpack = keras.quantizers.unpack_int4

    def noted(x, *args, **kwargs):
        unpacked.append(tuple(x.shape))
        return unpack(x, *args, **kwargs)

    monkeypatch.setattr(keras.quantizers, "unpack_int4", noted)
    np.testing.assert_array_equal(to_numpy(layer(TOKENS % 50)), expected)
    assert unpacked == [(*TOKENS.shape, 17)]
