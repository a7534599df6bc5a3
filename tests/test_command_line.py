"""The command line answers, and explains what it cannot do."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import pytest

import keras_nlp_cache
from keras_nlp_cache import default_model
from keras_nlp_cache.chat import chat_prompt
from keras_nlp_cache.cli import main
from tests.families import FAMILIES

QUESTION = "What is the capital of France?"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "keras_nlp_cache", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_answers_a_question_with_a_real_model(smollm2):
    backend = keras.config.backend()
    result = run("generate", QUESTION, "--backend", backend)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital of France is Paris.\n"
    assert "7 tokens" in result.stderr and "tokens/s" in result.stderr


def test_options_in_process(smollm2, capsys):
    status = main(
        [
            "generate",
            "The capital of France is",
            "--preset",
            smollm2,
            "--raw",
            "--max-new-tokens",
            "3",
            "--sampler",
            "top_k",
            "--temperature",
            "0.01",
            "--seed",
            "1",
            "--dtype",
            "bfloat16",
        ]
    )
    captured = capsys.readouterr()
    assert status == 0
    assert "Paris" in captured.out
    assert "[3 tokens" in captured.err


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in (
        keras_nlp_cache.__version__,
        keras.__version__,
        f"backend          {keras.config.backend()}",
        "GPT2, Gemma, Llama, Llama3",
    ):
        assert words in out


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    family = FAMILIES[0]
    preprocessor = family.preprocessor()
    backbone = family.backbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size()
    )
    path = tmp_path_factory.mktemp("presets") / "gpt2"
    family.ours("CausalLM")(backbone, preprocessor).save_to_preset(path)
    return path


def test_a_keras_preset(preset, capsys):
    assert main(["generate", "the fox", "--preset", str(preset)]) == 2
    assert "64 positions" in capsys.readouterr().err
    command = ["generate", "the fox", "--preset", str(preset)]
    assert main([*command, "--max-new-tokens", "5"]) == 0


def damage(preset, tmp_path, name, change):
    copy = tmp_path / "damaged"
    shutil.copytree(preset, copy)
    change(copy / name)
    return copy


DAMAGE = {
    "a truncated weights file": (
        "model.weights.h5",
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
    ),
    "no weights file": ("model.weights.h5", pathlib.Path.unlink),
    "a garbled config": (
        "config.json",
        lambda path: path.write_text("{"),
    ),
    "an unknown class": (
        "config.json",
        lambda path: path.write_text(json.dumps({"registered_name": "x>Y"})),
    ),
    "no tokenizer": ("tokenizer.json", pathlib.Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_presets(kind, preset, tmp_path, capsys):
    path = damage(preset, tmp_path, *DAMAGE[kind])
    if kind == "no tokenizer":
        (path / "preprocessor.json").unlink()
        (path / "task.json").unlink()
    assert main(["generate", "the fox", "--preset", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("keras-nlp-cache: error: cannot load the preset")
    assert "Traceback" not in err


def test_a_truncated_safetensors_file(smollm2, tmp_path, capsys):
    path = tmp_path / "damaged"
    path.mkdir()
    for file in pathlib.Path(smollm2).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path)
    with open(pathlib.Path(smollm2) / "model.safetensors", "rb") as file:
        (path / "model.safetensors").write_bytes(file.read(100_000))
    assert main(["generate", QUESTION, "--preset", str(path)]) == 2
    assert "cannot load the preset" in capsys.readouterr().err


MISTAKES = {
    "no such directory": (
        ["generate", "x", "--preset", "./nowhere"],
        "nowhere",
    ),
    "an empty prompt": (["generate", " "], "empty"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes(kind, capsys):
    arguments, words = MISTAKES[kind]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and not captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["chat"],
        ["generate", "x", "--sampler", "beam"],
        ["generate", "x", "--max-new-tokens", "0"],
        ["generate", "x", "--max-new-tokens", "many"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--temperature", "nan"],
        ["generate", "x", "--dtype", "int8"],
        ["generate", "x", "--backend", "numpy"],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: keras-nlp-cache" in capsys.readouterr().err


class Interrupted(KeyboardInterrupt):
    pass


def half_a_conversion(folder):
    pathlib.Path(folder, "config.json").write_text("{}")
    raise Interrupted


def no_space(folder):
    pathlib.Path(folder, "config.json").write_text("{}")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", [half_a_conversion, no_space])
def test_a_conversion_that_is_cut_off(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "_convert", fault)
    with pytest.raises((Interrupted, OSError)):
        default_model.preset(tmp_path)
    assert not [x for x in tmp_path.iterdir() if x.is_dir()]


def test_a_conversion_that_was_killed(tmp_path, monkeypatch):
    """What a killed process left is cleared away, not taken for a model."""

    def convert(folder):
        pathlib.Path(folder, "config.json").write_text("{}")

    monkeypatch.setattr(default_model, "_convert", convert)
    finished = pathlib.Path(default_model.preset(tmp_path))
    leftover = tmp_path / f".{finished.name}.unfinished-killed"
    shutil.move(finished, leftover)
    assert pathlib.Path(default_model.preset(tmp_path)) == finished
    assert finished.is_dir() and not leftover.exists()


def test_a_full_disk_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default_model, "_convert", no_space)
    assert main(["generate", QUESTION]) == 2
    assert "No space left" in capsys.readouterr().err


def test_chat_template(smollm2, tmp_path):
    prompt = chat_prompt(smollm2, "Hi!", start_token="<|im_start|>")
    assert prompt.startswith("system\n")
    assert prompt.endswith(
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_prompt(str(tmp_path), "Hi!") == "Hi!"
