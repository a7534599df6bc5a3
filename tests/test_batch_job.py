"""Many prompts are answered, whatever ends the process in between."""

import json
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import types
import warnings

import keras_hub
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_nlp_cache import batch_job
from keras_nlp_cache.batch_job.answers_file import AnswersFile
from keras_nlp_cache.command_line.cli import main
from keras_nlp_cache.models import CausalLM
from tests.families import FAMILIES
from tests.families import on_one_backend

pytestmark = on_one_backend("what becomes of files is tried")

COUNT = 12
LINES = [{"prompt": f"prömpt {i}", "id": f"id {i}"} for i in range(COUNT)]
ANSWERS = [
    {
        "id": f"id {i}",
        "index": i,
        "answer": f"PRÖMPT {i}",
        "finish_reason": "stop",
        "tokens": 2,
    }
    for i in range(COUNT)
]


class Model:
    """Answers two prompts at a time, the second first, in capitals.

    It refuses what is "long", as a model does: with all that is under way.

    Args:
        name: str. What tells it from other models.
        before: Function of how many answers it has given, called before each.
    """

    def __init__(self, name="float32", before=lambda count: None):
        self.backbone = types.SimpleNamespace(sites=(), variables=())
        self.sampler = keras_hub.samplers.GreedySampler()
        self.cache_dtype = name
        self.before, self.asked, self.count = before, [], 0

    def generate_many(self, prompts, *, batch_size, **options):
        rows = []
        for i, prompt in enumerate(x["prompt"] for x in prompts):
            self.asked.append(prompt)
            rows.append((i, prompt))
            if len(rows) == batch_size:
                yield from self.answers(rows)
                rows = []
        yield from self.answers(rows)

    def answers(self, rows):
        if any("long" in prompt for _, prompt in rows):
            raise ValueError("Expected a shorter prompt.")
        for i, prompt in reversed(rows):
            self.before(self.count)
            self.count += 1
            yield (
                i,
                {
                    "text": prompt.upper(),
                    "finish_reason": "stop",
                    "token_ids": [1, 2],
                },
            )


def run(model, files, **kwargs):
    return batch_job.run(model, *files, batch_size=2, **kwargs)


def make_files(folder, lines=LINES):
    """Paths of a file of prompts, and of one that is not there yet."""
    files = tuple(pathlib.Path(folder, x) for x in ("in.jsonl", "out.jsonl"))
    files[0].write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return files


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


def answers_in(files):
    """The answers in a file of whole lines, in the order of the prompts."""
    text = files[1].read_bytes().decode()
    assert text.endswith("\n") or not text
    answers = [json.loads(line) for line in text.split("\n")[:-1]]
    return sorted(answers, key=lambda x: x["index"])


def whole_in(path):
    """How many whole answers are in a file, whatever else is."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return sum(line.endswith(b"}") for line in lines)


def in_child(function, *args):
    """Calls a function in a process of its own, which may be killed.

    Returns:
        `(status, raised)`: how the process ended, and what was raised there.
    """
    with tempfile.TemporaryFile() as file:
        with warnings.catch_warnings():
            # Other libraries have threads, which this has no use for.
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            try:
                function(*args)
            except BaseException as e:
                file.write(f"{type(e).__name__}: {e}".encode())
                file.flush()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return status, file.read().decode()


def run_and_die(files, writes, size):
    """Runs a job until it is killed in a write, after some of the line."""
    write = os.write

    def dying(file, data):
        nonlocal writes
        if not writes:
            write(file, data[:size])
            os.kill(os.getpid(), signal.SIGKILL)
        writes -= 1
        return write(file, data)

    os.write = dying
    run(Model(), files)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 60)),
        min_size=1,
        max_size=4,
    )
)
def test_a_job_that_is_killed_goes_on(deaths):
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(folder)
        for writes, size in deaths:
            before = whole_in(files[1])
            status, raised = in_child(run_and_die, files, writes, size)
            assert not raised
            if status == 0:  # There were no more writes to die in.
                assert whole_in(files[1]) == COUNT
            else:
                assert os.WTERMSIG(status) == signal.SIGKILL
                assert whole_in(files[1]) >= before
        done = whole_in(files[1])
        model = Model()
        assert run(model, files) == (COUNT, done, 0)
        # What is done is not done again.
        assert model.count == COUNT - done
        assert answers_in(files) == ANSWERS


def test_a_file_that_ends_anywhere(files, tmp_path):
    """Half a line is answered again, and a line that lacks its end is not."""
    run(Model(), files)
    text = files[1].read_bytes()
    for size in range(len(text) - 70, len(text)):
        files[1].write_bytes(text[:size])
        whole = whole_in(files[1])
        assert (
            run(Model(), files).earlier == whole in (COUNT - 2, COUNT - 1, 12)
        )
        assert answers_in(files) == ANSWERS


def test_an_interrupted_job_goes_on(files):
    def interrupt(count):
        if count == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"5 of 12 .*goes on"):
        run(Model(before=interrupt), files)
    assert len(answers_in(files)) == 5
    assert run(Model(), files) == (COUNT, 5, 0)
    assert answers_in(files) == ANSWERS


def test_an_interrupt_within_a_write_leaves_a_whole_line(files, monkeypatch):
    write, left = os.write, 8

    def interrupted(file, data):
        nonlocal left
        left -= 1
        size = write(file, data[: len(data) if left > 3 else 10])
        if left in (0, 4):
            raise KeyboardInterrupt
        return size

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        # The first comes after all of a line, the second within another.
        for count in (3, 3):
            with pytest.raises(KeyboardInterrupt):
                run(Model(), files)
            assert len(answers_in(files)) == count
    run(Model(), files)
    assert answers_in(files) == ANSWERS


def run_on_a_full_disk(files, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    run(Model(), files)


def test_a_full_disk(files):
    status, raised = in_child(run_on_a_full_disk, files, 480)
    assert status == 0
    done = len(answers_in(files))
    assert 0 < done < COUNT and files[1].stat().st_size < 480
    words = rf"OSError: .*File too large; {done} of 12 .*out.jsonl.*goes on"
    assert re.match(words, raised)
    assert run(Model(), files) == (COUNT, done, 0)
    assert answers_in(files) == ANSWERS


def test_two_jobs_do_not_write_to_one_file(files):
    with AnswersFile(files[1]):
        _, raised = in_child(run, Model(), files)
    assert "another job writes to it" in raised
    run(Model(), files)
    assert answers_in(files) == ANSWERS


def test_a_prompt_that_cannot_be_answered(tmp_path):
    lines = [{"prompt": x} for x in ("a", "b", "long", "c", "d", "long", "e")]
    files = make_files(tmp_path, lines)
    assert run(Model(), files) == (7, 0, 2)
    answers = answers_in(files)
    assert [x.get("answer", "") for x in answers] == [*"AB", "", *"CD", "", "E"]
    assert answers[2]["error"] == "Expected a shorter prompt."
    # It will be no shorter another time.
    model = Model()
    assert run(model, files) == (7, 7, 0) and not model.asked


class Halving(Model):
    def answers(self, rows):
        for i, _ in rows:
            text = "half of a pair: \ud83d"
            yield i, {"text": text, "finish_reason": "stop", "token_ids": [1]}


def test_an_answer_that_is_no_unicode(files):
    assert run(Halving(), files) == (COUNT, 0, 0)
    assert {x["answer"] for x in answers_in(files)} == {
        "half of a pair: \ud83d"
    }
    assert run(Halving(), files).earlier == COUNT


@pytest.mark.parametrize("count", [1, 100])
def test_a_model_that_answers_nothing(count, tmp_path):
    files = make_files(tmp_path, [{"prompt": "long"}] * count)
    model = Model()
    with pytest.raises(ValueError, match="refuses.*shorter prompt"):
        run(model, files)
    # It does not take all of them to find out.
    assert answers_in(files) == [] and len(model.asked) < 200


class MistakenModel(Model):
    def answers(self, rows):
        if len(rows) > 1:
            raise ValueError("a mistake")
        yield from super().answers(rows)


def test_a_model_that_is_mistaken(files):
    """What it refuses is none of its prompts."""
    with pytest.raises(ValueError, match="a mistake"):
        run(MistakenModel(), files)
    assert answers_in(files) == ANSWERS[:2]


def test_prompts_are_read_as_they_are_needed(files):
    """And their ids are what lines say, or else the numbers of lines."""
    files[0].write_text(
        '\ufeff{"prompt": "a"}\n\n{"prompt": "b"}\n \r\n', "utf-8"
    )

    def grow(count):
        with open(files[0], "a") as file:
            file.write("what others write")

    assert run(Model(before=grow), files) == (2, 0, 0)
    assert [(x["id"], x["index"]) for x in answers_in(files)] == [
        (1, 0),
        (3, 1),
    ]


def test_prompts_that_change_under_a_job(files):
    def change(count):
        make_files(files[0].parent, ["no prompt"] * 1000)

    # More than is read at a time.
    files[0].write_text('{"prompt": "a"}\n' * 1000)
    with pytest.raises(OSError, match=r"not to change.* \d+ of 1000 prompts"):
        run(Model(before=change), files)


BAD_LINES = {
    "no JSON": ('{"prompt": ', "expected JSON"),
    "too deep": ("[" * 100000, "expected JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', "'utf-8' codec can't decode"),
    "no object": ("3", "object.*received 3"),
    "no prompt": ("{}", r'either a "prompt" or "messages", received \[\]'),
    "both": ('{"prompt": "", "messages": []}', "either"),
    "an unknown key": ('{"prompt": "x", "sead": 1}', r'received \["sead"\]'),
    "a number": ('{"prompt": 3}', "a string, received 3"),
    "no Unicode": (r'{"prompt": "\ud800"}', "Unicode"),
    "a bad id": ('{"prompt": "x", "id": true}', "id.*received true"),
    "an id twice": ('{"prompt": "x", "id": "a"}', 'received "a", as line 1'),
    "a number as an id": ('{"prompt": "x", "id": 2}', "as line 2"),
    "no messages": ('{"messages": []}', r"list of messages.*received \[\]"),
    "a message": ('{"messages": ["x"]}', 'received "x"'),
    "no content": ('{"messages": [{"role": "user"}]}', '"content", received'),
    "no text": (
        '{"messages": [{"role": "user", "content": null}]}',
        "a string, received null",
    ),
    "what a template refuses": (
        '{"messages": [{"role": "x", "content": ""}]}',
        "no such role",
    ),
}


def chat_prompt(messages):
    if any(x["role"] == "x" for x in messages):
        raise ValueError("no such role")
    return "\n".join(f"{x['role']}: {x['content']}" for x in messages)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(kind, files):
    line, words = BAD_LINES[kind]
    line = line if isinstance(line, bytes) else line.encode()
    first = b'{"prompt": "x", "id": "a"}\n{"prompt": "y"}\n'
    files[0].write_bytes(first + line + b'\n{"prompt": "z"}')
    model = Model()
    with pytest.raises(ValueError, match=f"line 3: .*{words}"):
        run(model, files, chat_prompt=chat_prompt)
    assert not model.asked and not files[1].exists()


def test_many_bad_lines(files):
    files[0].write_text("x\n" * 9)
    with pytest.raises(ValueError, match=r"line 1(.|\n)*line 5.*\nand 4 more$"):
        run(Model(), files)


def test_no_prompts(files):
    files[0].write_text("\n\n")
    with pytest.raises(ValueError, match="which has none"):
        run(Model(), files)


def test_messages(tmp_path):
    messages = [{"role": "system", "content": "s"}]
    messages += [{"role": "user", "content": "u"}]
    files = make_files(tmp_path, [{"messages": messages}, {"prompt": "p"}])
    with pytest.raises(ValueError, match='line 1: expected a "prompt"'):
        run(Model(), files)
    run(Model(), files, chat_prompt=chat_prompt)
    texts = [x["answer"] for x in answers_in(files)]
    assert texts == ["SYSTEM: S\nUSER: U", "USER: P"]


OTHERS = {
    "model": (
        lambda files: {"model": Model("bfloat16")},
        "another model: cache_dtype='bfloat16', before 'float32'",
    ),
    "settings": (
        lambda files: {"max_new_tokens": 3},
        "other settings: max_new_tokens=3, before 256",
    ),
    "form": (lambda files: {"chat_prompt": chat_prompt}, "chat_prompt=True"),
    "prompts": (
        lambda files: make_files(files[0].parent, LINES[:-1]) and {},
        "other prompts",
    ),
    "no sidecar": (
        lambda files: os.remove(f"{files[1]}.job") or {},
        "to say what the answers.*FileNotFoundError",
    ),
    "a damaged sidecar": (
        lambda files: pathlib.Path(f"{files[1]}.job").write_text("{") and {},
        "to say what the answers",
    ),
    "a foreign sidecar": (
        lambda files: pathlib.Path(f"{files[1]}.job").write_text("[]") and {},
        "to say what the answers",
    ),
    "a foreign line": (
        lambda files: files[1].write_text("[1]\n") and {},
        "line 1 is no answer",
    ),
    "a foreign end": (
        lambda files: (
            os.remove(f"{files[1]}.job")
            or (files[1].write_text('{"id": 1}\nmy notes') and {})
        ),
        "line 2 is no answer",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_job_does_not_go_on(kind, files):
    def stop(count):
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Model(before=stop), files)
    prepare, words = OTHERS[kind]
    kwargs = {"model": Model(), "files": files, **prepare(files)}
    before = files[1].read_bytes()
    with pytest.raises(ValueError, match=words):
        run(**kwargs)
    assert files[1].read_bytes() == before
    # Which is what `overwrite` is for.
    summary = run(**kwargs, overwrite=True)
    assert summary.earlier == 0
    assert len(answers_in(files)) == summary.prompts


def test_answers_do_not_replace_prompts(files):
    with pytest.raises(ValueError, match="to another file"):
        run(Model(), (files[0], files[0]), overwrite=True)
    assert files[0].exists()


@pytest.mark.parametrize("kind", ["no folder", "a folder", "no file"])
def test_places_where_nothing_can_be_written(kind, files, tmp_path):
    output = {
        "no folder": tmp_path / "nowhere" / "out.jsonl",
        "a folder": tmp_path,
        "no file": pathlib.Path(os.devnull),
    }[kind]
    model = Model()
    with pytest.raises(OSError, match=re.escape(str(output.parent))):
        run(model, (files[0], output))
    assert not model.asked and not (tmp_path / "nowhere").exists()


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("presets") / "gpt2"
    FAMILIES[0].text_lm().save_to_preset(path)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    config = {"chat_template": template, "bos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


PROMPTS = ["the fox", "jumps", "the lazy dog", "over", "the capital of france"]


def command(preset, files, *more):
    arguments = ["generate", "--preset", preset, "--max-new-tokens", "5"]
    return [
        *arguments,
        "--input",
        str(files[0]),
        "--output",
        str(files[1]),
        *more,
    ]


def test_the_command_goes_on(preset, tmp_path, monkeypatch, capsys):
    files = make_files(tmp_path, [{"prompt": x} for x in PROMPTS])
    generate_many = CausalLM.generate_many

    def interrupted(self, *args, **kwargs):
        answers = generate_many(self, *args, **kwargs)
        yield next(answers)
        yield next(answers)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "generate_many", interrupted)
        assert main(command(preset, files, "--raw", "--batch-size", "2")) == 130
    assert "\nkeras-nlp-cache: 2 of 5 prompts" in capsys.readouterr().err
    assert len(answers_in(files)) == 2
    assert main(command(preset, files, "--raw")) == 0
    assert "3 of 5 prompts answered, 2 done before" in capsys.readouterr().err
    # What one prompt after the other is answered with.
    lm = CausalLM.from_preset(preset)
    lm.compile(sampler="greedy")
    assert [x["answer"] for x in answers_in(files)] == [
        "".join(lm.stream(x, 5)) for x in PROMPTS
    ]
    # With a chat template, these are other answers.
    assert main(command(preset, files)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras-nlp-cache: error: Expected to go on with")
    assert main(command(preset, files, "--overwrite")) == 0
    assert [x["answer"] for x in answers_in(files)] == [
        "".join(lm.stream(f"{x} ", 5)) for x in PROMPTS
    ]


def test_what_is_drawn_does_not_depend_on_where_a_job_began(tmp_path):
    lines = [{"prompt": x} for x in PROMPTS]
    lines[3]["seed"] = 9
    (tmp_path / "anew").mkdir()
    files, anew = make_files(tmp_path, lines), make_files(tmp_path / "anew")
    lm = FAMILIES[0].text_lm()
    sampler = keras_hub.samplers.RandomSampler(seed=3, temperature=20.0)
    lm.compile(sampler=sampler)
    options = {"max_new_tokens": 5, "batch_size": 2}
    batch_job.run(lm, *files, **options)
    whole = answers_in(files)
    assert len({x["answer"] for x in whole}) > 2
    # Begun again without the first and the last, with much drawn since.
    kept = [x for x in files[1].read_text().splitlines() if '"index": 2' in x]
    files[1].write_text("\n".join([*kept, ""]))
    batch_job.run(lm, *files, **options)
    assert answers_in(files) == whole
    # The one with a seed is what it is anywhere.
    anew[0].write_text(json.dumps(lines[3]))
    batch_job.run(lm, *anew, **options)
    assert answers_in(anew)[0]["answer"] == whole[3]["answer"]


def test_the_command_says_what_was_not_answered(preset, tmp_path, capsys):
    prompts = ["the fox", "the fox " * 100]
    files = make_files(tmp_path, [{"prompt": x} for x in prompts])
    assert main(command(preset, files, "--raw")) == 1
    err = capsys.readouterr().err
    assert '1 of 2 prompts answered, 1 with an "error" in' in err
    assert "positions" in answers_in(files)[1]["error"]


MISTAKES = {
    "nothing": ([], "either a prompt or --input, received neither"),
    "both": (
        ["x", "--input", "x"],
        "either a prompt or --input, received both",
    ),
    "no output": (["--input", "x"], "expected --output"),
    "no input": (["x", "--output", "x"], "expected --output with --input"),
    "no batch": (["x", "--batch-size", "3"], "--batch-size with --input"),
    "no cluster": (
        ["--input", "x", "--output", "y", "--workers", "2"],
        "--workers with --ray",
    ),
    "no file": (["--input", "x", "--output", "y"], "No such file.*'x'"),
    "no prompts": (
        ["--input", os.devnull, "--output", "y"],
        "Expected prompts.*/dev/null",
    ),
}


def test_a_cluster_without_ray(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="`pip install"):
        batch_job.run_on_ray(Model, *files)
    assert not files[1].exists()


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes(kind, capsys):
    arguments, words = MISTAKES[kind]
    assert main(["generate", "--preset", "nowhere", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err) and not captured.out


def test_progress(files, capsys):
    run(Model(), files)
    assert capsys.readouterr().err == ""  # It is no terminal.
    run(Model(), files, overwrite=True, progress=True)
    assert "12/12" in capsys.readouterr().err
