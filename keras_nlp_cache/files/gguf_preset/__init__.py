"""GGUF files as presets: each is converted once to a Hugging Face directory.

`conversion.py` says where to and how, `architectures.py` what configs and
tensors are called on both sides, `vocabulary.py` how tokenizers are written.
"""

import os

from keras_nlp_cache.files.cache_folder import cache_folder
from keras_nlp_cache.files.gguf_preset.conversion import converted

__all__ = ["cache_folder", "converted", "directory"]


def directory(preset):
    """Converts a preset that is a GGUF file, and leaves others as they are.

    Args:
        preset: What `CausalLM.from_preset()` takes.

    Returns:
        A path as a string for a file or a name that ends in `.gguf`, and
        `preset` itself for all others.

    Raises:
        ImportError, OSError, ValueError: See `converted()`.
    """
    if isinstance(preset, (str, os.PathLike)) and not os.path.isdir(preset):
        path = os.fspath(preset)
        named = path.lower().endswith(".gguf") and "://" not in path
        if named or os.path.isfile(path):
            return converted(path)
    return preset
