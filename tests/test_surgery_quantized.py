"""Quantized models are edited, and edited models quantized (QLoRA)."""

import gc
import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import divided
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import to_numpy
from tests.families import XLA
from tests.test_prefix_tuning import gradients
from tests.test_prefix_tuning import loss_of
from tests.test_quantization import NARROW
from tests.test_quantization import quantize

PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}
LLAMA = FAMILIES[3]
MODES = ("int8", "int4")
both_modes = pytest.mark.parametrize("mode", MODES)


def task(family, **kwargs):
    return family.task(family.backbone(num_layers=BLOCKS, **kwargs), None)


_quantized = {}


def quantized(family, mode):
    """One for all edits of it, since quantizing takes a while."""
    if (family, mode) not in _quantized:
        _quantized[family, mode] = quantize(task(family), mode)
    return _quantized[family, mode]


def check(edited, tmp_path):
    """It runs through a cache, generates, and is loaded as it was saved."""
    full = full_forward(edited.backbone)
    assert np.isfinite(full).all()
    # What a rounding tips over in one, it may not in the other.
    cached = cached_forward(edited.backbone)
    assert np.std(cached - full) <= 0.02 * np.std(full)
    edited.save(tmp_path / "lm.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    assert {w.path for w in loaded.weights} == {w.path for w in edited.weights}
    assert len({w.path for w in loaded.weights}) == len(loaded.weights)
    np.testing.assert_allclose(
        full_forward(loaded.backbone), full, atol=1e-4, rtol=1e-4
    )
    return loaded


def modes(model):
    return {layer.quantization_mode for layer in model._flatten_layers()} - {
        None
    }


@pytest.mark.parametrize(
    "mode, edit", divided(zip(itertools.cycle(MODES), EDITS))
)
def test_edit_of_a_quantized_model(mode, edit, tmp_path):
    lm = quantized(LLAMA, mode)
    before = full_forward(lm.backbone)
    edited = EDITS[edit].apply(lm)
    # Calibrated or not, what is there keeps its weights.
    kept = {w.path: w for w in lm.weights}
    assert all(w is kept[w.path] for w in edited.weights if w.path in kept)
    assert modes(check(edited, tmp_path)) == {mode}
    np.testing.assert_array_equal(full_forward(lm.backbone), before)


@pytest.mark.parametrize(
    "mode, edit", divided(zip(itertools.cycle(MODES[::-1]), EDITS))
)
def test_an_edited_model_quantized(mode, edit, tmp_path):
    edited = EDITS[edit].apply(task(LLAMA))
    expected = full_forward(edited.backbone)
    quantize(edited, mode)
    x = full_forward(edited.backbone)
    limit = 0.99 if mode == "int8" else 0.85
    assert np.corrcoef(x.ravel(), expected.ravel())[0, 1] > limit
    check(edited, tmp_path)


@in_turn("mode", ["int8", "int4", "int8"])
def test_adapters_of_quantized_projections(family, mode, tmp_path):
    """They start as nothing, add their product, and alone are trained."""
    lm = quantized(family, mode)
    adapted = surgery.add_lora(
        lm, slice(None), 2, ["query", "key", "value", "output"]
    )
    np.testing.assert_array_equal(
        full_forward(adapted.backbone), full_forward(lm.backbone)
    )
    for weight in lm.weights:
        weight.trainable = False
    before = [ops.convert_to_numpy(w) for w in lm.weights]
    adapters = adapted.trainable_weights
    assert len(adapters) == 8 * BLOCKS
    assert {keras.backend.standardize_dtype(w.dtype) for w in adapters} == {
        "float32"
    }
    # XLA compiles that for longer than all else takes.
    options = XLA if family.name == "gpt2" else {}
    adapted.compile(
        optimizer=keras.optimizers.Adam(1e-3), sampler="greedy", **options
    )
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    losses = adapted.fit(x, np.full_like(TOKENS, 7), epochs=8, verbose=0)
    losses = losses.history["loss"]
    assert losses[-1] < losses[0] - 0.3
    assert all(to_numpy(w).any() for w in adapters)
    for weight, value in zip(lm.weights, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)

    block = adapted.backbone.blocks[0]
    attention = getattr(block, block.attention_name)
    adapter = getattr(attention, attention.projections["query"])
    x = ops.convert_to_tensor(
        np.random.default_rng(0).normal(size=(1, 3, 32)), "float32"
    )
    update = to_numpy(x) @ to_numpy(adapter.down) @ to_numpy(adapter.up)
    np.testing.assert_allclose(
        to_numpy(adapter(x)),
        to_numpy(adapter.projection(x)) + update.reshape(1, 3, 4, 8),
        atol=1e-4,
        rtol=1e-4,
    )
    generated = adapted.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], adapted)
    check(adapted, tmp_path)


@pytest.mark.parametrize("at", ["made", "loaded"])
@each_kind
def test_gradient_of_quantized_logits(family, at, tmp_path):
    """Through the weights, not through what is left of a rounding."""
    if family.name == "rwkv7":
        pytest.skip("RWKV-7 has a dense layer for logits")
    lm = quantized(family, "int8")
    if at == "loaded":
        lm.save(tmp_path / "lm.keras")
        lm = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    hidden_states = np.random.default_rng(0).normal(size=(2, 3, 32))

    def derive(lm):
        embedding = lm.backbone.output_embedding
        (gradient,) = gradients(
            lambda x: loss_of(embedding(x[0], reverse=True)),
            [hidden_states.astype("float32")],
        )
        return to_numpy(gradient)

    expected = derive(task(family))
    error = derive(lm) - expected
    assert np.std(error) <= 0.02 * np.std(expected)


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_calibrated_models(mode, tmp_path):
    known = dict(LLAMA.config)
    lm = task(LLAMA, **{x: NARROW[x] for x in NARROW if x in known})
    quantize(lm, mode)
    before = full_forward(lm.backbone)
    edited = surgery.add_lora(lm, slice(None), 2)
    edited = surgery.ablate_heads(edited, 1, 0)
    edited = surgery.add_attention_sink(edited, 2)
    edited = surgery.insert_after(
        edited, 0, keras.layers.Dense(16, name="added")
    )
    vector = surgery.ControlVector({1: np.ones(16)}, _hint(lm))
    edited = surgery.apply(edited, vector)
    assert full_forward(edited.backbone).shape == before.shape
    np.testing.assert_array_equal(full_forward(lm.backbone), before)
    edited.compile(sampler="greedy")
    assert edited.generate(PROMPTS, stop_token_ids=None)


def _hint(lm):
    return type(lm).__name__.removesuffix("CausalLM").lower()


@both_modes
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_dtypes(mode, dtype, tmp_path):
    """What is put beside a quantized layer is of the dtype it came from."""
    lm = quantize(task(LLAMA, dtype=dtype), mode)
    edited = EDITS["add_lora"].apply(lm)
    edited = EDITS["add_attention_sink"].apply(edited)
    added = {w.path for w in edited.weights} - {w.path for w in lm.weights}
    for weight in edited.weights:
        if weight.path in added:
            assert keras.backend.standardize_dtype(
                weight.dtype
            ) == dtype.replace("mixed_bfloat16", "float32")
    expected = full_forward(edited.backbone)
    edited.save(tmp_path / "lm.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    assert loaded.backbone.compute_dtype == "bfloat16"
    np.testing.assert_allclose(
        full_forward(loaded.backbone), expected, atol=1e-3
    )


def test_a_policy_for_each_layer(tmp_path):
    """A layer of our own follows the one that it is put on, not the map."""
    policies = keras.dtype_policies.DTypePolicyMap(
        "float32",
        {".*layer_1/self_attention/.*": keras.DTypePolicy("mixed_bfloat16")},
    )
    lm = task(LLAMA, dtype=policies)
    edited = surgery.add_lora(lm, slice(None), 2)
    np.testing.assert_array_equal(
        full_forward(edited.backbone), full_forward(lm.backbone)
    )
    adapters = [
        layer
        for layer in edited.backbone._flatten_layers()
        if isinstance(layer, surgery.LowRankAdapter)
    ]
    assert {x.compute_dtype for x in adapters} == {"float32", "bfloat16"}
    edited.save(tmp_path / "lm.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    np.testing.assert_allclose(
        full_forward(loaded.backbone), full_forward(edited.backbone), atol=1e-4
    )


@both_modes
def test_edits_of_a_loaded_model(mode, tmp_path):
    """Keras builds it with a policy for each quantized layer."""
    quantized(LLAMA, mode).save(tmp_path / "lm.keras")
    lm = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    lm.backbone.trainable = False
    for edit in ("insert_a_block", "add_lora", "ablate_heads"):
        lm = EDITS[edit].apply(lm)
    check(lm, tmp_path)


@pytest.fixture(autouse=True, scope="module")
def _forget():
    yield
    _quantized.clear()
    gc.collect()
