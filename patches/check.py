"""Applies the series to their releases and runs the suite without the package.

    python patches/check.py --backend torch
    python patches/check.py --keras-hub 0.33.0

For each backend: the tests that speak of behaviour, against patched projects in
a virtual environment that does not have `keras_nlp_cache`, and the tokens that
upstream's classes generate there, against those of the release.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from series import DoesNotApply
from series import pristine_tree
from series import REPOSITORY
from series import SERIES

BACKENDS = ("jax", "tensorflow", "torch")
# What does not need the package: how a graph with a cache is called, and what
# a task does with it.
TESTS = (
    "test_cached_decoding.py",
    "test_functional_graph.py",
    "test_generate.py",
    "test_inputs.py",
    "test_rows.py",
)


def main(argv=None):
    """Parses arguments and does what they ask; returns an exit status."""
    parser = argparse.ArgumentParser(
        description="Checks that the patched projects do what the package does."
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="all of them by default",
    )
    for project in SERIES:
        parser.add_argument(
            f"--{project}",
            metavar="VERSION",
            help="the release to patch, by default the one pinned",
        )
    parser.add_argument(
        "pytest_arguments", nargs="*", help="passed on, after `--`"
    )
    args = parser.parse_args(argv)
    versions = {
        project: getattr(args, project.replace("-", "_"))
        or SERIES[project].version
        for project in SERIES
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _check(
                pathlib.Path(folder),
                versions,
                args.backend or BACKENDS,
                args.pytest_arguments,
            )
        except DoesNotApply as e:
            print(e, file=sys.stderr)
        except subprocess.CalledProcessError as e:
            print(f"{e}\n{e.stderr or ''}", file=sys.stderr)
        return 1


def _check(folder, versions, backends, pytest_arguments):
    trees = {True: [], False: []}
    for project, series in SERIES.items():
        if not series.patches:
            continue
        tree = folder / "patched" / project
        trees[True].append(series.tree(tree, versions[project]))
        tree = folder / "pristine" / project
        pristine_tree(project, versions[project], tree)
        trees[False].append(tree)
    suite = folder / "suite"
    shutil.copytree(REPOSITORY / "tests", suite / "tests")
    shutil.copy(REPOSITORY / "pyproject.toml", suite)
    pythons = {
        patched: _environment(folder / f"venv-{patched}", installed)
        for patched, installed in trees.items()
    }
    rows = []
    for backend in backends:
        tokens = {}
        for patched, python in pythons.items():
            path = folder / f"{backend}-{patched}.npz"
            _run(python, backend, suite, "-m", "tests.reference", path)
            tokens[patched] = dict(np.load(path))
        differ = [
            name
            for name, expected in tokens[False].items()
            if not np.array_equal(expected, tokens[True][name])
        ]
        process = _run(
            pythons[True],
            backend,
            suite,
            "-m",
            "pytest",
            *(f"tests/{name}" for name in TESTS),
            *pytest_arguments,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(process.stdout)
        summary = re.findall(r"^=+ (.*) in .*=$", process.stdout, re.M)
        rows.append(
            (backend, process.returncode, (summary or ["no summary"])[-1])
            + (f"tokens differ: {differ}" if differ else "equal tokens",)
        )
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for backend, status, *row in rows:
        print(f"{backend:12}{'FAILED' if status else 'ok':8}{'; '.join(row)}")
    failed = any(row[1] or row[3] != "equal tokens" for row in rows)
    return int(failed)


def _environment(path, trees):
    """Makes a virtual environment with some projects, not the package."""
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    python = path / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    names = {
        line.split("==")[0]
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    }
    wanted = ["hypothesis", "jax", "parameterized", "pydot", "pytest"]
    wanted += ["keras", "keras-hub", "torch", "sentencepiece"]
    assert names.issuperset(wanted)
    constraints = REPOSITORY / "constraints.txt"
    subprocess.run([*pip, "-c", constraints, *wanted], check=True)
    for tree in trees:
        subprocess.run(
            [*pip, "--no-deps", "--force-reinstall", tree], check=True
        )
    return python


def _run(python, backend, suite, *command, check=True, **kwargs):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_NLP_CACHE_SUBJECT": "patched",
        "PYTHONPATH": str(suite),
    }
    return subprocess.run(
        [python, *map(str, command)],
        cwd=suite,
        env=environment,
        check=check,
        **kwargs,
    )


if __name__ == "__main__":
    sys.exit(main())
