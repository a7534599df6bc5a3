"""Modules are read in one order: those below import none of those above."""

import ast
import pathlib

import keras_nlp_cache
from tests.families import on_one_backend

ROOT = pathlib.Path(keras_nlp_cache.__file__).parent
ORDER = (
    "__init__",
    "coverage",
    "garbage",
    "memory",
    "files",
    "compile_cache",
    "device",
    "default_model",
    "drop_in",
    "kernels",
    "layers",
    "cache",
    "attention",
    "experts",
    "blocks",
    "quantization",
    "products",
    "graph",
    "generate",
    "models",
    "surgery",
    "batch_job",
    "command_line",
    "__main__",
)


def imported(path):
    """The names that a module imports from the package, as lists of parts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *parts = node.module.split(".")
            if package == "keras_nlp_cache":
                yield from ([*parts, name.name] for name in node.names)


@on_one_backend("modules are read")
def test_imports_go_down():
    upward = []
    for path in ROOT.rglob("*.py"):
        (first, *_) = path.relative_to(ROOT).parts
        here = ORDER.index(first.removesuffix(".py"))
        upward += [
            f"{path.relative_to(ROOT)}: {'.'.join(parts)}"
            for parts in imported(path)
            if ORDER.index(parts[0]) > here
        ]
    assert upward == []
