"""The series of patches fits its release, and does what the package does."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest

from tests.families import on_one_backend
from tests.reference import reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "patches"))
series = importlib.import_module("series")
KERAS, HUB = series.SERIES["keras"], series.SERIES["keras-hub"]
# So many of the patches for keras_hub mend it; the others add to it.
MENDING = 14
# All that `patches/check.py` runs, on the backend that compiles nothing.
TESTS = ["test_functional_graph.py"]
if keras.config.backend() == "torch":
    TESTS += ["test_cached_decoding.py", "test_generate.py", "test_inputs.py"]
    TESTS += ["test_rows.py"]
without_a_change = on_one_backend("what was wrong upstream is shown")


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Path of the installed keras_hub with the series applied."""
    tree = tmp_path_factory.mktemp("patched") / "tree"
    series.installed_tree(keras_hub, tree)
    return HUB.apply(tree)


def python(patched, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_NLP_CACHE_SUBJECT": "patched",
            "PYTHONPATH": os.pathsep.join([str(patched), str(ROOT)]),
        },
        capture_output=True,
        text=True,
    )


def test_tokens_of_the_release(patched, tmp_path):
    """They come without the package, too."""
    path = tmp_path / "tokens.npz"
    process = python(
        patched,
        "-c",
        "import sys; sys.modules['keras_nlp_cache'] = None\n"
        "import keras_hub, runpy\n"
        f"assert keras_hub.__file__.startswith({str(patched)!r})\n"
        "runpy.run_module('tests.reference', run_name='__main__')",
        path,
    )
    assert process.returncode == 0, process.stderr
    tokens = np.load(path)
    for name, expected in reference().items():
        np.testing.assert_array_equal(tokens[name], expected, err_msg=name)


def test_behaviour_of_the_package(patched, tmp_path):
    results = os.environ.get("KERAS_NLP_CACHE_PATCHED_XML", tmp_path / "xml")
    process = python(
        patched,
        *("-m", "pytest", "-p", "no:xdist", f"--junitxml={results}"),
        # `patches/check.py` runs all.
        *("-m", "not not_deep"),
        *(ROOT / "tests" / name for name in TESTS),
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert "patched keras_hub" in process.stdout


def run_tests_of_the_series(patched, files, *options):
    """Runs tests that a series adds to a project; returns what pytest says."""
    return python(
        patched,
        *("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("--import-mode=importlib", *options),
        *(patched / file for file in sorted(files)),
    ).stdout


@on_one_backend("upstream runs its tests on each, and the suite here does")
def test_tests_of_keras_hub(patched):
    changed = series._git(patched, "diff", "--name-only", series.PRISTINE)
    tests = [x for x in changed.split() if x.endswith("_test.py")]
    output = run_tests_of_the_series(patched, tests)
    assert re.search(r" \d+ passed(, \d+ skipped)?, ", output), output[-5000:]


@without_a_change
def test_tests_of_keras_hub_without_what_mends_it(patched, tmp_path):
    """Those of what was wrong fail."""
    changes = "\n".join(patch.read_text() for patch in HUB.patches[:MENDING])
    files = set(re.findall(r"^\+\+\+ b/(.*)$", changes, re.M))
    names = re.findall(r"^\+    def (test_\w+)", changes, re.M)
    tree = tmp_path / "tree"
    series._git(tmp_path, "clone", "--quiet", patched, tree)
    folders = {os.path.dirname(file) for file in files}
    series._git(tree, "checkout", series.PRISTINE, "--", *folders)
    tests = [file for file in files if file.endswith("_test.py")]
    assert len(tests) == MENDING
    output = run_tests_of_the_series(tree, tests)
    failed = rf" {len(names)} failed(, \d+ skipped)?, "
    assert re.search(failed, output), output[-5000:]


@pytest.mark.parametrize(
    "outcome", ["passed", pytest.param("failed", marks=without_a_change)]
)
def test_regression_tests_of_keras(outcome, tmp_path):
    """They pass with the changes that they come with, and fail without."""
    tree = tmp_path / "tree"
    series.installed_tree(keras, tree)
    KERAS.apply(tree)
    changes = "\n".join(patch.read_text() for patch in KERAS.patches)
    files = set(re.findall(r"^\+\+\+ b/(.*_test\.py)$", changes, re.M))
    names = re.findall(r"^\+    def (test_\w+)", changes, re.M)
    assert len(names) >= len(KERAS.patches)

    if outcome == "failed":
        changed = set(re.findall(r"^\+\+\+ b/(.*)$", changes, re.M)) - files
        series._git(tree, "checkout", series.PRISTINE, "--", *changed)
    output = run_tests_of_the_series(tree, files, "-k", " or ".join(names))
    *_, summary = re.findall(r"^=+ (.* in .*) =+$", output, re.M)
    counts = {
        kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)", summary)
    }
    # Some are of another backend.
    skipped = counts.get("skipped", 0)
    assert skipped < len(names)
    assert counts.get(outcome) == len(names) - skipped, output[-5000:]


def test_generated_files_are_those_of_the_package(monkeypatch, tmp_path):
    assert len(HUB.generated) > 5
    assert HUB.stale() == []
    # And it would be noticed.
    for patch in HUB.patches:
        text = patch.read_text().replace("def attend(", "def attend_to(")
        (tmp_path / patch.name).write_text(text)
    for name in ("generated.toml", "generated.diff"):
        shutil.copy(HUB.folder / name, tmp_path)
    monkeypatch.setattr(series.Series, "folder", tmp_path)
    assert HUB.stale() == ["keras_hub/src/layers/cache/attend.py"]
    diff = (tmp_path / "generated.diff").read_text()
    (tmp_path / "generated.diff").write_text(
        diff.replace("\n-    key, key_scale", "\n-    key, scale_of_key")
    )
    with pytest.raises(
        series.DoesNotApply,
        match=r"generated.diff .*\n.*attention/functions.py, hunk \d+ of \d+",
    ):
        HUB.stale()


@pytest.mark.parametrize(
    "patch",
    KERAS.patches + HUB.patches,
    ids=lambda patch: f"{patch.parent.name}-{patch.name[:4]}",
)
def test_patches_are_for_reviewers(patch):
    message, _, diff = patch.read_text().partition("\ndiff --git ")
    paragraphs = ("Problem: ", "Approach: ", "Effect: ", "Compatibility: ")
    for paragraph in paragraphs:
        assert f"\n\n{paragraph}" in message
    assert max(map(len, message.splitlines())) <= 78
    assert set(re.findall(r"^\+\+\+ b/(\w+)/", diff, re.M)) == {
        patch.parent.name.replace("-", "_")
    }
    # Of upstream, the lines that go and no context.
    changes = [x for x in diff.splitlines() if x[:1] == " " and x.strip()]
    assert changes == []


def test_the_readme_counts_lines(patched):
    changes = [
        re.match(r"(\d+)\t(\d+)\tkeras_hub/src/(.*)", line).groups()
        for line in series._git(
            patched, "diff", "--numstat", series.PRISTINE
        ).splitlines()
    ]
    rows = {f"| `{path}` | {come} | {go} |" for come, go, path in changes}
    come, go = (sum(int(x[i]) for x in changes) for i in range(2))
    readme = (ROOT / "patches" / "README.md").read_text()
    assert f"In all, {come} lines come and {go} go" in readme
    assert rows - set(readme.splitlines()) == {
        f"| `{folder}/__init__.py` | 0 | 0 |"
        for folder in ("layers/cache", "models/cached_backbone")
    }


@pytest.fixture
def another_release(tmp_path):
    """Path of an installed keras_hub with a line of another release."""
    tree = tmp_path / "another"
    series.installed_tree(keras_hub, tree)
    path = tree / "keras_hub/src/models/llama/llama_decoder.py"
    path.write_text(path.read_text().replace("rope_scaling_", "rope_"))
    series._git(tree, "commit", "--all", "--quiet", "--message=Another")
    return tree


def test_another_release_is_refused(another_release):
    with pytest.raises(series.DoesNotApply, match=r"0001-.*\n.*llama_decoder"):
        HUB.apply(another_release)


def test_a_hunk_that_does_not_fit_is_named(patched, another_release, tmp_path):
    series.export(patched, tmp_path / "with_context")
    first, *_ = sorted((tmp_path / "with_context").glob("*.patch"))
    with pytest.raises(
        series.DoesNotApply,
        match=r"0001-.*\n.*llama_decoder.py, hunk 1 of 1, line \d+",
    ):
        series._apply(another_release, first)
