"""Keras language models with one functional graph, cache included.

Nothing is imported until it is used, so that the command line can choose the
Keras backend first.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "ChatTemplate": "keras_nlp_cache.files.chat_template",
    "StepModel": "keras_nlp_cache.generate.step_model",
    "load_model": "keras_nlp_cache.drop_in",
}

_MODULES = ("batch_job", "models", "surgery")

__all__ = [
    "ChatTemplate",
    "StepModel",
    "batch_job",
    "load_model",
    "models",
    "surgery",
]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"keras_nlp_cache.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
