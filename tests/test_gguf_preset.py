"""GGUF files are presets: the same tensors, logits and tokens."""

import json
import pathlib
import shutil

import gguf
import keras
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from keras_nlp_cache import models
from keras_nlp_cache.files import gguf_preset
from keras_nlp_cache.files.gguf_preset import conversion
from tests import gguf_files
from tests.families import random_tokens
from tests.families import to_numpy

CLASSES = {
    "gpt2": "GPT2CausalLM",
    "gemma": "GemmaCausalLM",
    "gemma2": "GemmaCausalLM",
    "gemma3": "Gemma3CausalLM",
    "llama": "LlamaCausalLM",
    "llama3": "Llama3CausalLM",
}
every_model = pytest.mark.parametrize("name", gguf_files.MODELS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(folder))
    return folder


def stored(model, quantization):
    """What of the tensors of a Gemma model a file can hold."""
    kind = gguf.GGMLQuantizationType[quantization]
    return {
        key: (x + 1) - 1
        if "norm" in key
        else torch.tensor(gguf.dequantize(gguf.quantize(x.numpy(), kind), kind))
        for key, x in model.state_dict().items()
    }


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@every_model
def test_tensors_are_those_of_transformers(name, quantization, tmp_path):
    path = tmp_path / "x.gguf"
    model = gguf_files.write(path, name, quantization=quantization)
    if name == "gemma":
        # transformers reads no files of Gemma 1.
        expected = stored(model, quantization)
    else:
        expected = transformers.AutoModelForCausalLM.from_pretrained(
            # Of GPT-2 it does not read the sizes.
            tmp_path,
            gguf_file="x.gguf",
            dtype="float32",
            config=model.config,
        ).state_dict()
    converted = pathlib.Path(gguf_preset.converted(path))
    tensors = safetensors.numpy.load_file(converted / "model.safetensors")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert tensors.keys() == expected.keys() - tied
    for key, x in tensors.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected[key].numpy(), err_msg=key)
    # Hugging Face reads the directory, too.
    again = transformers.AutoModelForCausalLM.from_pretrained(converted)
    for key, x in again.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), expected[key].numpy())


@every_model
def test_logits_and_tokens(name, tmp_path):
    path = tmp_path / "x.gguf"
    model = gguf_files.write(path, name)
    lm = models.CausalLM.from_preset(path)
    assert type(lm) is getattr(models, CLASSES[name])
    token_ids = random_tokens(2, 12) % model.config.vocab_size
    with torch.no_grad():
        expected = model(torch.tensor(token_ids.astype("int64"))).logits
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    np.testing.assert_allclose(
        to_numpy(lm(inputs)), expected.numpy(), atol=1e-4, rtol=1e-4
    )
    ours, original = lm.preprocessor.tokenizer, gguf_files.tokenizer(name)
    for words in ("the quick brown fox", "paris at the airport"):
        np.testing.assert_array_equal(ours(words), original(words))
    for end in ("start_token_id", "end_token_id"):
        assert getattr(ours, end) == getattr(original, end)
    assert ours.detokenize(ours("the fox")) == "the fox"


def test_gemma_3_270m(gemma3_270m):
    """The real weights, in four kinds of numbers, and a real vocabulary."""
    file, folder = gemma3_270m
    lm = models.CausalLM.from_preset(folder)
    lm.compile(sampler="greedy")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32"
    )
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name
    )
    prompts = [
        "The capital of France is",
        "<start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n"
        "<start_of_turn>model\n",
    ]
    length = 40
    answers = lm.generate(prompts, max_length=length, stop_token_ids=None)
    tokenizer = lm.preprocessor.tokenizer
    for prompt, answer in zip(prompts, answers):
        token_ids = their_tokenizer(prompt, return_tensors="pt").input_ids
        ours = [tokenizer.start_token_id, *np.array(tokenizer(prompt))]
        assert token_ids[0].tolist() == ours
        with torch.no_grad():
            logits = theirs(token_ids).logits.numpy()
            expected = theirs.generate(
                token_ids,
                max_length=length,
                do_sample=False,
                eos_token_id=None,
            )
        inputs = {"token_ids": token_ids.numpy().astype("int32")}
        inputs["padding_mask"] = np.ones_like(inputs["token_ids"])
        np.testing.assert_allclose(
            to_numpy(lm(inputs)), logits, atol=1e-3, rtol=1e-4
        )
        assert answer == tokenizer.detokenize(expected[0, 1:].numpy())


def test_a_backbone_from_a_file(tmp_path):
    gguf_files.write(tmp_path / "X.GGUF", "llama3")
    path = str(tmp_path / "X.GGUF")
    backbone = models.Llama3Backbone.from_preset(path, dtype="bfloat16")
    assert backbone.compute_dtype == "bfloat16"
    with pytest.raises(ValueError, match="Llama3Backbone"):
        models.GPT2CausalLM.from_preset(path)


@every_model
def test_the_config_is_that_of_the_model(name, tmp_path):
    model = gguf_files.write(tmp_path / "x.gguf", name)
    folder = gguf_preset.converted(tmp_path / "x.gguf")
    config, told = (
        dict(keras.tree.flatten_with_path(x.to_dict()))
        for x in (
            transformers.AutoConfig.from_pretrained(folder),
            model.config,
        )
    )
    unknown = {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "transformers_version",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
    }
    for key in told:
        if key[0] not in unknown:
            assert config[key] == pytest.approx(told[key]), key


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_scale_queries_otherwise(name, layers, tmp_path):
    path = tmp_path / "x.gguf"
    model = gguf_files.random_model(name, num_hidden_layers=layers)
    gguf_files.write(path, name, model)
    config = json.loads(
        pathlib.Path(gguf_preset.converted(path), "config.json").read_text()
    )
    # A width of 32, shared by 4 heads, which are wider than that.
    assert config["query_pre_attn_scalar"] == 8


@pytest.mark.parametrize("absent", [True, False])
def test_gemma_3_without_a_window(absent, tmp_path):
    """Then all layers turn positions as the global ones do."""

    def change(metadata, tensors):
        del metadata["gemma3.attention.sliding_window"]
        if not absent:
            metadata["gemma3.attention.sliding_window"] = 0

    path = tmp_path / "x.gguf"
    model = gguf_files.random_model(
        "gemma3", layer_types=["full_attention"] * 6
    )
    gguf_files.write(path, "gemma3", model, change=change)
    token_ids = random_tokens(1, 12) % model.config.vocab_size
    with torch.no_grad():
        expected = model(torch.tensor(token_ids.astype("int64"))).logits
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    np.testing.assert_allclose(
        to_numpy(models.CausalLM.from_preset(path)(inputs)),
        expected.numpy(),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_chat_templates_and_what_they_spell(name, tmp_path):
    """A control token of a sentencepiece vocabulary is found in text."""
    path = tmp_path / "x.gguf"

    def change(metadata, tensors):
        metadata["tokenizer.ggml.tokens"][-1] = "<start_of_turn>"
        metadata["tokenizer.ggml.token_type"][-1] = 3
        metadata["tokenizer.ggml.tokens"][-2] = "  "
        metadata["tokenizer.ggml.token_type"][-2] = 4

    gguf_files.write(path, name, change=change)
    lm = models.CausalLM.from_preset(path)
    message = {"role": "user", "content": "hi"}
    assert lm.chat_template.render([message]) == "<bos>hi"
    tokenizer = lm.preprocessor.tokenizer
    last = tokenizer.vocabulary_size() - 1
    assert last in np.array(tokenizer("the <start_of_turn>fox"))
    assert last - 1 in np.array(tokenizer("the  fox"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_repeated_embeddings(name, tmp_path):
    """Some files of families with one matrix hold it twice."""

    def repeat(metadata, tensors):
        kind = gguf.GGMLQuantizationType.Q4_1
        x = gguf.quantize(tensors["token_embd.weight"], kind)
        tensors["output.weight"] = x, kind

    path = tmp_path / "x.gguf"
    gguf_files.write(path, name, change=repeat)
    converted = pathlib.Path(gguf_preset.converted(path))
    tensors = safetensors.numpy.load_file(converted / "model.safetensors")
    assert "lm_head.weight" not in tensors


def metadata(name="llama3", **values):
    values = {key.replace("__", "."): x for key, x in values.items()}

    def write(path):
        gguf_files.write(path, name, change=lambda x, _: x.update(values))

    return write


def tensors(change, name="llama3"):
    def write(path):
        gguf_files.write(path, name, change=lambda _, x: change(x))

    return write


def drop(key):
    return lambda x: x.pop(key)


def scale(key, factor):
    return lambda x: x.update({key: (factor * x[key]).astype("float32")})


def add(key, shape=(32,)):
    return lambda x: x.update({key: np.ones(shape, "float32")})


def cut(path):
    gguf_files.write(path, "llama3")
    path.write_bytes(path.read_bytes()[:-200])


def cut_header(path):
    gguf_files.write(path, "llama3")
    path.write_bytes(path.read_bytes()[:300])


def whole_bytes(x):
    kind = gguf.GGMLQuantizationType.I8
    x["output_norm.weight"] = np.ones(32, "int8"), kind


def merge_of_nothing(path):
    gguf_files.write(
        path,
        "llama3",
        change=lambda x, _: x["tokenizer.ggml.merges"].append("no thing"),
    )


REFUSED = {
    "another architecture": (
        metadata(general__architecture="qwen2"),
        r"\['gpt2', 'gemma', 'gemma2', 'gemma3', 'llama'\].*'qwen2'",
    ),
    "a control vector": (
        metadata(general__architecture="controlvector"),
        "'controlvector'",
    ),
    "positions scaled linearly": (
        metadata(llama__rope__scaling__type="linear"),
        "'linear'",
    ),
    "positions scaled in an old way": (
        metadata(llama__rope__scale_linear=4.0),
        "rope.scale_linear.*4.0",
    ),
    "other rotary factors": (
        tensors(scale("rope_freqs.weight", 3.0)),
        "rotary factors",
    ),
    "a window": (
        metadata(llama__attention__sliding_window=8),
        "sliding_window",
    ),
    "wider heads": (
        metadata(llama__attention__key_length=16),
        "key_length`=8.*16",
    ),
    "half of each head rotated": (
        metadata(llama__rope__dimension_count=4),
        "dimension_count`=8.*4",
    ),
    "Gemma with another base": (
        metadata("gemma2", gemma2__rope__freq_base=5e5),
        "freq_base`=10000.*500000",
    ),
    "Gemma 3 with another base": (
        metadata("gemma3", gemma3__rope__freq_base=5e5),
        "freq_base`=1000000.*500000",
    ),
    "Gemma 3 with another base of its local layers": (
        metadata("gemma3", gemma3__rope__freq_base_swa=5e5),
        "freq_base_swa`=10000.*500000",
    ),
    "Gemma 3 with as many global layers as local ones": (
        metadata("gemma3", gemma3__attention__sliding_window_pattern=2),
        "sliding_window_pattern`=6.*2",
    ),
    "Gemma 3 with positions scaled in another way": (
        metadata("gemma3", gemma3__rope__scaling__type="yarn"),
        "'yarn'",
    ),
    "heads that differ by layer": (
        metadata(llama__attention__head_count=[4, 2]),
        r"head_count.*\[4, 2\]",
    ),
    "experts": (tensors(add("blk.0.ffn_gate_inp.weight")), "ffn_gate_inp"),
    "a bias": (tensors(add("blk.1.attn_q.bias")), "attn_q.bias"),
    "a tensor less": (tensors(drop("blk.1.attn_q.weight")), "attn_q.weight"),
    "no epsilon": (
        lambda path: gguf_files.write(
            path,
            "llama3",
            change=lambda x, _: x.pop("llama.attention.layer_norm_rms_epsilon"),
        ),
        "layer_norm_rms_epsilon",
    ),
    "a matrix for the output": (
        tensors(add("output.weight", (60, 32)), "gemma2"),
        "output matrix",
    ),
    "a part of a model": (metadata(split__count=3), "3 parts"),
    "a type without values": (tensors(whole_bytes), "output_norm.weight.*I8"),
    "another tokenizer": (
        metadata("gpt2", tokenizer__ggml__model="bert"),
        "tokenizer.*'bert'",
    ),
    "fewer tokens": (metadata(tokenizer__ggml__tokens=["a", "b"]), "tokens.*2"),
    "an end that is no token": (
        metadata(tokenizer__ggml__eos_token_id=10**6),
        "eos_token.*1000000",
    ),
    "merges of nothing": (merge_of_nothing, "merges of its tokens"),
    "a truncated file": (cut, "complete GGUF file"),
    "a truncated header": (cut_header, "complete GGUF file"),
    "an empty file": (pathlib.Path.touch, "complete GGUF file"),
    "text": (lambda path: path.write_text("hello"), "complete GGUF file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused(kind, tmp_path, home):
    write, words = REFUSED[kind]
    path = tmp_path / "x.gguf"
    write(path)
    with pytest.raises(ValueError, match=words) as error:
        models.CausalLM.from_preset(path)
    assert "\n" not in str(error.value)
    # Nothing is left that could be taken for a model.
    assert not home.exists() or not [x for x in home.iterdir() if x.is_dir()]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt2", "gpt2__attention__layer_norm_epsilon"),
        ("gemma2", "gemma2__attention__layer_norm_rms_epsilon"),
    ],
)
def test_an_epsilon_that_keras_has_built_in(name, key, tmp_path):
    metadata(name, **{key: 1e-3})(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="eps.* to be 1e-0.*0.001"):
        models.CausalLM.from_preset(tmp_path / "x.gguf")


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "x.gguf", str(tmp_path / "x.gguf")):
        with pytest.raises(FileNotFoundError, match="x.gguf"):
            models.CausalLM.from_preset(path)


def test_other_presets_are_left_alone(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for preset in (
        "gpt2_base_en",
        "hf://x/y.gguf",
        str(tmp_path / "folder.gguf"),
        3,
    ):
        assert gguf_preset.directory(preset) is preset


def test_a_file_is_converted_once(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    model = gguf_files.write(path, "llama3")
    first = gguf_preset.converted(path)
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_convert", None)
        assert gguf_preset.converted(path) == first
    # Other weights under the same name, as many.
    model.model.norm.weight.data += 1
    gguf_files.write(path, "llama3", model)
    assert len(path.read_bytes()) == len(content)
    second = gguf_preset.converted(path)
    assert second != first
    x, y = (
        safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")
        for folder in (first, second)
    )
    np.testing.assert_array_equal(
        x["model.norm.weight"] + 1, y["model.norm.weight"]
    )


class Interrupted(KeyboardInterrupt):
    pass


def half_a_conversion(path, folder):
    pathlib.Path(folder, "config.json").write_text("{}")
    raise Interrupted


def no_space(path, folder):
    pathlib.Path(folder, "config.json").write_text("{}")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", [half_a_conversion, no_space])
def test_a_conversion_that_is_cut_off(fault, tmp_path, home, monkeypatch):
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr(conversion, "_convert", fault)
    with pytest.raises((Interrupted, OSError)):
        gguf_preset.converted(tmp_path / "x.gguf")
    assert not [x for x in home.iterdir() if x.is_dir()]


def test_a_conversion_that_was_killed(tmp_path, home, monkeypatch):
    """What a killed process left is cleared away, not taken for a model."""

    def convert(path, folder):
        pathlib.Path(folder, "config.json").write_text("{}")

    path = tmp_path / "x.gguf"
    path.touch()
    monkeypatch.setattr(conversion, "_convert", convert)
    finished = pathlib.Path(gguf_preset.converted(path))
    leftover = home / f".{finished.name}.unfinished-killed"
    shutil.move(finished, leftover)
    assert pathlib.Path(gguf_preset.converted(path)) == finished
    assert finished.is_dir() and not leftover.exists()
