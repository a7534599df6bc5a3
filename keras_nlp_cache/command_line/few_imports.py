"""Imports Keras for a command, and not all that Keras would make use of.

Keras and keras_hub import what they find installed, for parts of theirs that no
command calls: scikit-learn for its wrappers, Matplotlib and pandas for figures,
TensorFlow for pipelines of `tf.data`. On 2 cores that is 3.5 s of 5.2 before a
model is loaded. Without these they go without, as they do where these are not
installed.
"""

import contextlib
import os
import sys

from keras_nlp_cache.garbage import collecting_none

_OPTIONAL = ("matplotlib", "pandas", "sklearn")
# keras_hub's tokenizers do without it on all backends but its own.
_TENSORFLOW = ("tensorflow", "tensorflow_text")


@contextlib.contextmanager
def importing(preset=None):
    """In this scope, models are imported and loaded without the rest.

    After it, all can be imported again.

    Args:
        preset: Optional. What is loaded in the scope, as a path if it is one.
            TensorFlow knows of more places to load from than the local disk.
    """
    with _without(_OPTIONAL), collecting_none():
        import keras
    names = _OPTIONAL
    if keras.config.backend() != "tensorflow":
        if preset is None or os.path.exists(preset):
            names += _TENSORFLOW
    with _without(names), collecting_none():
        yield


@contextlib.contextmanager
def _without(names):
    """In this scope, modules that were not imported yet cannot be."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
