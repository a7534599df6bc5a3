"""GGUF files whose matrices stay as they are stored: the same, and small."""

import importlib.util
import pathlib
import pickle

import gguf
import keras
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import device
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from keras_nlp_cache.command_line.cli import main
from keras_nlp_cache.files import gguf_preset
from keras_nlp_cache.files.gguf_preset import stored
from keras_nlp_cache.products import choice
from keras_nlp_cache.products import grouped_layers
from keras_nlp_cache.products import multiplying
from keras_nlp_cache.quantization.groups import in_groups
from tests import gguf_files
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import XLA

FORMATS = ("Q8_0", "Q4_0", "Q4_1")
every_format = pytest.mark.parametrize("kind", FORMATS)
# Bytes of a number: its own bits, and scales and zeros of 4 bytes, or of 1.
BYTES = {"Q8_0": 1 + 4 / 32, "Q4_0": 0.5 + 5 / 32, "Q4_1": 0.5 + 8 / 32}
# Of more than one group in a row, in all that is summed over.
WIDE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8)
WIDTHS = {"gpt2": dict(n_embd=64, n_inner=96)}
PROMPTS = {
    "token_ids": random_tokens(5, 16) % 40 * padding_mask([4, 9, 3, 5, 6], 16),
    "padding_mask": padding_mask([4, 9, 3, 5, 6], 16),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(folder))
    return folder


def write(path, name, kind, **kwargs):
    widths = WIDTHS.get(name, WIDE)
    model = gguf_files.random_model(name, **widths)
    return gguf_files.write(path, name, model, kind, **kwargs)


def load(path, keep_quantized=True, **kwargs):
    return models.CausalLM.from_preset(
        path, keep_quantized=keep_quantized, preprocessor=None, **kwargs
    )


def both(path, **kwargs):
    """A file, widened and kept."""
    return load(path, False, **kwargs), load(path, **kwargs)


def logits(lm):
    size = lm.backbone.token_embedding.input_dim
    token_ids = random_tokens(2, 12) % size
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return to_numpy(keras.ops.cast(lm(inputs), "float32"))


def assert_close(lm, expected):
    expected = logits(expected)
    most = np.abs(expected).max()
    np.testing.assert_allclose(logits(lm), expected, atol=1e-5 * most)


def greedy(lm, prompts=PROMPTS, **kwargs):
    lm.compile(sampler="greedy", **kwargs)
    return lm.generate(prompts, stop_token_ids=None)["token_ids"]


def kept_layers(lm):
    return [x for x in lm._flatten_layers() if in_groups(x)]


def weight_bytes(lm):
    return sum(
        np.prod(x.shape) * np.dtype(x.dtype).itemsize for x in lm.variables
    )


@every_format
@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_logits_are_those_of_the_widened(name, kind, tmp_path, capsys):
    write(tmp_path / "x.gguf", name, kind)
    expected, lm = both(tmp_path / "x.gguf")
    assert type(lm) is type(expected)
    assert_close(lm, expected)
    assert f"in {kind}." in capsys.readouterr().err
    # Of Gemma, projections with a matrix for each head become floats.
    left = ("query", "key", "value") if "gemma" in name else ()
    for layer in lm.backbone._flatten_layers():
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            assert in_groups(layer) == (layer.name not in left), layer.path
    assert in_groups(lm.backbone.token_embedding)
    for layer in kept_layers(lm):
        assert {x.name for x in layer.trainable_variables} <= {"bias"}


@every_format
def test_bytes(kind, tmp_path, monkeypatch):
    """Of the weights, which are all that has a value while they load."""
    write(tmp_path / "x.gguf", "llama3", kind)
    made = []
    initialize = keras.Variable._deferred_initialize

    def noted(variable):
        made.append(variable)
        initialize(variable)

    expected = load(tmp_path / "x.gguf", False)
    with monkeypatch.context() as patch:
        patch.setattr(keras.Variable, "_deferred_initialize", noted)
        lm = load(tmp_path / "x.gguf")
    in_use = {id(x) for x in lm.variables}
    assert made and not [x for x in made if id(x) not in in_use]
    floats = sum(x.size for x in expected.get_weights() if x.ndim > 1)
    rest = 4 * sum(x.size for x in expected.get_weights() if x.ndim == 1)
    # The number of its group for each number that is summed over.
    rest += sum(x.g_idx.shape[0] * 4 for x in kept_layers(lm) if kind != "Q8_0")
    assert weight_bytes(lm) <= BYTES[kind] * floats + rest


@pytest.fixture
def least_product():
    """A function that says of how large a weight a kernel is worth it."""
    yield lambda count: device.set_constants(least_product=count)
    device.set_constants()


@pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba"
)
@every_format
def test_generates_with_kernels(kind, tmp_path, monkeypatch, least_product):
    used = set()
    multiply = multiplying._multiply

    def noted(form, *args):
        used.add(form.dtype)
        return multiply(form, *args)

    monkeypatch.setattr(multiplying, "_multiply", noted)
    least_product(1)
    write(tmp_path / "x.gguf", "llama", kind)
    expected, lm = both(tmp_path / "x.gguf")
    tokens = greedy(expected)
    used.clear()
    np.testing.assert_array_equal(greedy(lm, **XLA), tokens)
    assert used == {"int8_in_groups" if kind == "Q8_0" else "int4"}
    # One row of `x`, rather than four at a time and one more.
    one = {name: x[:1] for name, x in PROMPTS.items()}
    np.testing.assert_array_equal(greedy(lm, one, **XLA), tokens[:1])


@every_format
def test_generates_without_kernels(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "most_rows", lambda dtype: 0)
    write(tmp_path / "x.gguf", "gemma2", kind)
    expected, lm = both(tmp_path / "x.gguf")
    np.testing.assert_array_equal(greedy(lm), greedy(expected))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", "Q8_0"), ("float16", "Q4_0"), ("mixed_bfloat16", "Q4_1")],
)
def test_other_dtypes(dtype, kind, tmp_path):
    """What is not kept has the dtype, and all is computed in it."""
    write(tmp_path / "x.gguf", "llama3", kind)
    lm = load(tmp_path / "x.gguf", dtype=dtype)
    assert lm.backbone.compute_dtype == dtype.removeprefix("mixed_")
    expected = logits(load(tmp_path / "x.gguf", False))
    most = np.abs(expected).max()
    np.testing.assert_allclose(logits(lm), expected, atol=0.05 * most)
    assert greedy(lm).shape == PROMPTS["token_ids"].shape


# === Files ===


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q8_0"), ("gemma2", "Q4_0"), ("llama", "Q4_1")]
)
def test_saved_and_loaded(name, kind, tmp_path):
    write(tmp_path / "x.gguf", name, kind)
    lm = load(tmp_path / "x.gguf")
    expected = logits(lm)
    preset = str(tmp_path / "preset")
    lm.save_to_preset(preset)
    size = (tmp_path / "preset" / "model.weights.h5").stat().st_size
    assert size < 2 * weight_bytes(lm) + 2**18
    lm.save(tmp_path / "lm.keras")
    lm.backbone.save_weights(tmp_path / "x.weights.h5")
    other = models.CausalLM.from_preset(preset, load_weights=False)
    other.backbone.load_weights(tmp_path / "x.weights.h5")
    for loaded in (
        models.CausalLM.from_preset(preset),
        keras.saving.load_model(tmp_path / "lm.keras"),
        pickle.loads(pickle.dumps(lm)),
        other,
    ):
        np.testing.assert_array_equal(logits(loaded), expected)
        assert len(kept_layers(loaded)) == len(kept_layers(lm))
        assert weight_bytes(loaded) == weight_bytes(lm)
    # Once more, for what is loaded was built in another way.
    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    np.testing.assert_array_equal(logits(again), expected)
    backbone = type(lm.backbone).from_preset(preset, dtype="bfloat16")
    assert backbone.compute_dtype == "bfloat16"
    bfloat16 = models.CausalLM.from_preset(preset, dtype="bfloat16")
    assert len(kept_layers(bfloat16)) == len(kept_layers(lm))
    np.testing.assert_allclose(
        logits(bfloat16), expected, atol=0.05 * np.abs(expected).max()
    )


@every_format
def test_edited_saved_and_loaded(kind, tmp_path):
    write(tmp_path / "x.gguf", "llama3", kind)
    expected, lm = both(tmp_path / "x.gguf")
    # A block of another model comes with a config of its own.
    block = load(tmp_path / "x.gguf").backbone.blocks[0]

    def edited(lm):
        lm = surgery.repeat_blocks(lm, slice(0, 2), 2)
        lm = surgery.insert_after(lm, 0, block)
        lm = surgery.add_lora(lm, slice(None), rank=2)
        return surgery.remove(lm, "block.1.attention")

    expected, lm = edited(expected), edited(lm)
    assert_close(lm, expected)
    np.testing.assert_array_equal(greedy(lm), greedy(expected))
    lm.save(tmp_path / "lm.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    assert weight_bytes(loaded) == weight_bytes(lm)


@every_format
def test_adapters_are_trained(kind, tmp_path):
    """As those of the widened: gradients pass through what is kept."""
    write(tmp_path / "x.gguf", "llama3", kind)
    token_ids = random_tokens(2, 12) % 40
    inputs = {
        "token_ids": token_ids[:, :-1],
        "padding_mask": np.ones_like(token_ids[:, :-1]),
    }
    losses = []
    for lm in both(tmp_path / "x.gguf"):
        lm.trainable = False
        keras.utils.set_random_seed(0)
        lm = surgery.add_lora(lm, slice(None), rank=2)
        lm.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        history = lm.fit(inputs, token_ids[:, 1:], epochs=3, verbose=0)
        losses.append(history.history["loss"])
    assert losses[1][2] < losses[1][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_the_folder_is_another_one(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, "llama3", "Q4_0")
    floats, kept = (
        gguf_preset.converted(path, keep_quantized=x) for x in (False, True)
    )
    assert floats != kept
    sizes = [
        sum(
            x.stat().st_size for x in pathlib.Path(folder).glob("*.safetensors")
        )
        for folder in (floats, kept)
    ]
    assert sizes[1] < 0.3 * sizes[0]
    # It is a preset of its own, with the argument and without.
    for keep in (False, True):
        lm = models.CausalLM.from_preset(kept, keep_quantized=keep)
        assert kept_layers(lm)
    backbone = models.Llama3Backbone.from_preset(path, keep_quantized=True)
    assert kept_layers(backbone)


# === What else is in files ===


def test_other_formats_are_widened(tmp_path, capsys):
    """A block of each, one that is float16, and Q5_0."""

    def change(metadata, tensors):
        rng = np.random.default_rng(0)
        for name in ("blk.0.ffn_up.weight", "blk.1.attn_q.weight"):
            kind = gguf.GGMLQuantizationType.Q5_0
            x = rng.standard_normal((96 if "ffn" in name else 64, 64))
            tensors[name] = gguf.quantize(x.astype("float32"), kind), kind
        x = rng.standard_normal((64, 96)).astype("float16")
        tensors["blk.0.ffn_down.weight"] = x

    write(tmp_path / "x.gguf", "llama3", "Q8_0", change=change)
    expected, lm = both(tmp_path / "x.gguf")
    assert_close(lm, expected)
    # 2 blocks of 7 and the embeddings, but for 3; 5 norms.
    err = capsys.readouterr().err
    assert "12 in Q8_0. As floats: 8 other tensors" in err
    np.testing.assert_array_equal(greedy(lm), greedy(expected))


def test_embeddings_and_logits_of_two_formats(tmp_path, capsys):
    """They are in one layer, and it has one format."""

    def change(metadata, tensors):
        x, _ = tensors["output.weight"]
        kind = gguf.GGMLQuantizationType.Q8_0
        x = gguf.dequantize(x, gguf.GGMLQuantizationType.Q4_0)
        tensors["output.weight"] = gguf.quantize(x, kind), kind

    write(tmp_path / "x.gguf", "llama", "Q4_0", change=change)
    expected, lm = both(tmp_path / "x.gguf")
    assert_close(lm, expected)
    assert not in_groups(lm.backbone.token_embedding)
    assert "14 in Q4_0. As floats: 7 other tensors" in capsys.readouterr().err


@every_format
def test_numbers_are_those_of_the_file(kind):
    """Each number, of groups that are flat, too, in which nothing is scaled."""
    x = np.random.default_rng(0).standard_normal((64, 96)).astype("float32")
    x[0], x[1], x[2, :32], x[3] = 0, 0.25, -3, 1e-3 * x[3] + 7
    quantized = gguf.GGMLQuantizationType[kind]
    rows = gguf.quantize(x, quantized)
    numbers, scale, smallest = stored.take_apart(rows, kind)
    y = np.repeat(scale.astype("float32"), 32, axis=1) * numbers
    if smallest is not None:
        y += np.repeat(smallest.astype("float32"), 32, axis=1)
    expected = gguf.dequantize(rows, quantized)
    np.testing.assert_array_equal(y, expected)

    layer = keras.layers.Dense(64, use_bias=False)
    layer.build((None, 96))
    grouped_layers.quantize_empty(layer, kind)
    grouped_layers.assign(
        layer, "kernel", stored.take_apart(rows, kind), np.transpose
    )
    ones = np.eye(96, dtype="float32")
    np.testing.assert_allclose(to_numpy(layer(ones)).T, expected, atol=1e-6)


# === What is refused ===


def test_presets_that_are_no_gguf_files(tmp_path):
    write(tmp_path / "x.gguf", "llama3", "Q8_0")
    lm = models.CausalLM.from_preset(tmp_path / "x.gguf")
    lm.save_to_preset(tmp_path / "preset")
    hugging_face = gguf_preset.converted(tmp_path / "x.gguf")
    for preset in (tmp_path / "preset", hugging_face, "gpt2_base_en"):
        for cls in (models.CausalLM, models.Llama3Backbone):
            with pytest.raises(ValueError, match="path of a GGUF file"):
                cls.from_preset(preset, keep_quantized=True)


@pytest.mark.parametrize("kind", ["F32", "Q5_0"])
def test_files_with_nothing_to_keep(kind, tmp_path, home):
    write(tmp_path / "x.gguf", "llama3", kind)
    with pytest.raises(ValueError, match=rf"Q8_0.*{kind}.*keep_quantized"):
        models.CausalLM.from_preset(tmp_path / "x.gguf", keep_quantized=True)
    assert not [x for x in home.iterdir() if x.is_dir()]


@every_format
def test_adapters_that_would_be_merged(kind, tmp_path):
    write(tmp_path / "x.gguf", "llama3", kind)
    lm = load(tmp_path / "x.gguf")
    for layer in (lm.backbone.token_embedding, kept_layers(lm)[0]):
        with pytest.raises(ValueError, match="surgery.add_lora"):
            layer.enable_lora(2)


def test_the_command_line(tmp_path, capsys):
    path = str(tmp_path / "x.gguf")
    write(path, "llama3", "Q4_1")
    command = ["generate", "the fox", "--max-new-tokens", "5", "--preset"]
    assert main([*command, path]) == 0
    expected = capsys.readouterr().out
    assert main([*command, path, "--keep-quantized"]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected
    assert "Kept as they are stored: 15 in Q4_1" in shown.err
    assert main([*command, str(tmp_path), "--keep-quantized"]) == 2
    error = capsys.readouterr().err
    assert "path of a GGUF file" in error and "--keep-quantized" in error
