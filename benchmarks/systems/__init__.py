"""The systems under test, by the names that the command line has."""

import importlib.util

from benchmarks.systems import of_keras
from benchmarks.systems import of_llama_cpp
from benchmarks.systems import of_transformers

SYSTEMS = {
    "ours": of_keras.Ours,
    "in_batches": of_keras.InBatches,
    "keras_hub": of_keras.KerasHub,
    "llama_cpp": of_llama_cpp.LlamaCpp,
    "transformers": of_transformers.Transformers,
    "transformers_compiled": of_transformers.TransformersCompiled,
}
# Those that run on any backend of Keras.
ON_EACH_BACKEND = ("ours", "in_batches", "keras_hub")
QUANTIZATIONS = of_keras.KerasSystem.quantizations


def check_installed(names):
    """Ends the program if a package is missing, before anything is loaded."""
    if "llama_cpp" in names and not importlib.util.find_spec(
        of_llama_cpp.MODULE
    ):
        raise SystemExit(of_llama_cpp.MISSING)
