"""`keras-nlp-cache steer` shows one answer in three moods."""

import contextlib
import io
import re

import keras
import numpy as np
import pytest

from keras_nlp_cache.command_line import steer_command
from keras_nlp_cache.command_line.cli import main
from keras_nlp_cache.surgery.control_vector import ControlVector
from tests.families import FAMILIES
from tests.families import in_words
from tests.test_command_line import run

QUESTION = "How do you feel today?"
HEADINGS = ["strength -3", "strength 0", "strength +3"]


def columns(out):
    """The words in each column of a table, its heading first."""
    rows = [
        [
            cell.strip()
            for cell in line.strip("│┃\n").replace("┃", "│").split("│")
        ]
        for line in out.splitlines()
        if line.startswith(("│", "┃"))
    ]
    return [[cell for cell in column if cell] for column in zip(*rows)]


@in_words
def test_three_moods_of_a_real_model(smollm2, tmp_path):
    path = tmp_path / "happy.gguf"
    result = run(
        "steer",
        QUESTION,
        "--max-new-tokens",
        "24",
        "--save",
        str(path),
        "--backend",
        keras.config.backend(),
        COLUMNS="120",
    )
    assert result.returncode == 0, result.stderr
    cells = columns(result.stdout)
    assert [cell[0] for cell in cells] == HEADINGS
    sad, plain, glad = (" ".join(cell[1:]) for cell in cells)
    assert len({sad, plain, glad}) == 3
    assert "grateful" in glad and "grateful" not in sad + plain
    for heading in HEADINGS:
        assert f"{heading}: [24 tokens" in result.stderr
    vector = ControlVector.load(path)
    assert list(vector.directions) == list(range(1, 30))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A small model, whose tokenizer has something for every character."""
    family = next(x for x in FAMILIES if x.name == "llama")
    preprocessor = family.preprocessor()
    backbone = family.backbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size()
    )
    path = tmp_path_factory.mktemp("presets") / "llama"
    family.task(backbone, preprocessor).save_to_preset(path)
    return str(path)


@pytest.fixture(scope="module")
def quick(preset, tmp_path_factory):
    """A command, the path of the vector that it kept, and what it showed."""
    path = tmp_path_factory.mktemp("vectors") / "quick.safetensors"
    command = ["steer", "the fox", "--preset", preset, "--max-new-tokens", "5"]
    command += ["--strength", "0.5", "--raw"]
    personas = ["--positive", "quick", "brown", "--negative", "lazy", "the"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*command, *personas, "--save", str(path)]) == 0
    return command, path, out.getvalue()


def test_personas_of_ones_own(quick, preset, capsys):
    _, path, out = quick
    cells = columns(out)
    headings = [cell[0] for cell in cells]
    assert headings == ["strength -0.5", "strength 0", "strength +0.5"]
    assert ControlVector.load(path).hidden_dim == 32
    plain = ["generate", "the fox", "--preset", preset, "--raw"]
    assert main([*plain, "--max-new-tokens", "5"]) == 0
    shown = " ".join(cells[1][1:]).split()
    assert shown == capsys.readouterr().out.split()


def test_a_kept_vector_in_a_narrow_terminal(quick, capsys, monkeypatch):
    command, path, out = quick
    monkeypatch.setenv("COLUMNS", "30")
    assert main([*command, "--vector", str(path)]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 30
    words = [word for cell in columns(out) for word in cell]
    assert narrow.split() == " ".join(words).split()


def test_prompts_of_a_contrast():
    def prompts(chat_prompt):
        return steer_command._prompts(["happy", "glad"], chat_prompt)

    plain = prompts(lambda text: text)
    assert len(set(plain)) == len(plain) >= 16
    assert plain[0].startswith("Act as if you're extremely happy. ")
    assert plain[-1].startswith("Act as if you're extremely glad. ")
    chat = prompts(lambda text: f"<user>{text}<assistant>")
    assert "happy.<assistant>I" in chat[0]


def vector_file(tmp_path, name="x.gguf", size=32, block=1):
    path = tmp_path / name
    ControlVector({block: np.ones(size)}, "llama").save(path)
    return str(path)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--positive", "happy"], "as many --positive as --negative.*1 and 0"),
        (["--negative", "sad"], "0 and 1"),
        (
            ["--positive", "a", "b", "--negative", "c", "d", "e"],
            "received 2 and 3",
        ),
        (["--positive", "sad", "--negative", "sad"], "differ.*equal"),
        (["--vector", "x.gguf", "--save", "y.gguf"], "--vector or --save"),
        (["--vector", "x.gguf", "--positive", "a"], "--vector or --positive"),
        (["--vector", "nowhere.gguf"], "nowhere.gguf"),
        (["--vector", "x.npz"], "gguf.*x.npz"),
        (["--vector", "garbled.gguf"], "garbled.gguf"),
        (["--vector", "wide.gguf"], "32.*size 33"),
        (["--vector", "deep.gguf"], "2 decoder blocks.*block 2"),
        (["--save", "x.npz"], "gguf.*x.npz"),
        (["--save", "nowhere/x.gguf"], "folder that exists.*nowhere/x.gguf"),
    ],
)
def test_mistakes(options, words, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vector_file(tmp_path)
    vector_file(tmp_path, "wide.gguf", size=33)
    vector_file(tmp_path, "deep.gguf", block=2)
    (tmp_path / "garbled.gguf").write_bytes(b"GGUF")
    assert main(["steer", "the fox", "--preset", preset, *options]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("keras-nlp-cache: error: ") and not captured.out
    assert re.search(words, error), error


def test_an_empty_prompt(capsys):
    assert main(["steer", " "]) == 2
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["steer"],
        ["steer", "x", "--strength", "0"],
        ["steer", "x", "--strength", "nan"],
        ["steer", "x", "--strength", "strong"],
        ["steer", "x", "--positive"],
        ["steer", "x", "--vector"],
        ["steer", "x", "--sampler", "top_k"],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: keras-nlp-cache" in capsys.readouterr().err


@pytest.mark.parametrize("width", [1, 20, 59, 60, 200])
def test_answers_are_shown_as_they_are(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    answer = "[bold]Hi[/bold] [/]"
    steer_command.show(dict.fromkeys(HEADINGS, answer))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    if width >= 60:
        cells = columns(out)
        assert [cell[0] for cell in cells] == HEADINGS
        assert [" ".join(cell[1:]) for cell in cells] == [answer] * 3
    else:
        assert "".join(out.split()) == "".join(
            heading + answer for heading in HEADINGS
        ).replace(" ", "")
