"""GGUF files as presets: each is converted once to a Hugging Face directory.

`conversion.py` says where to and how, `architectures.py` what configs and
tensors are called on both sides, `vocabulary.py` how tokenizers are written.
"""

import os

from keras_nlp_cache.files.cache_folder import cache_folder
from keras_nlp_cache.files.gguf_preset.conversion import converted
from keras_nlp_cache.files.gguf_preset.conversion import KEPT_WEIGHTS

__all__ = ["cache_folder", "converted", "directory"]


def directory(preset, keep_quantized=False):
    """Converts a preset that is a GGUF file, and leaves others as they are.

    Args:
        preset: What `CausalLM.from_preset()` takes.
        keep_quantized: bool. Whether matrices are to stay as they are stored,
            as far as that can be.

    Returns:
        A path as a string for a file or a name that ends in `.gguf`, and
        `preset` itself for all others.

    Raises:
        ImportError, OSError, ValueError: See `converted()`. Also if there are
            quantized weights to be kept of what is no GGUF file.
    """
    if isinstance(preset, (str, os.PathLike)) and not os.path.isdir(preset):
        path = os.fspath(preset)
        named = path.lower().endswith(".gguf") and "://" not in path
        if named or os.path.isfile(path):
            return converted(path, keep_quantized=keep_quantized)
    if keep_quantized and not _is_kept(preset):
        raise ValueError(
            "Expected the path of a GGUF file, whose quantized weights to keep "
            f"(`keep_quantized`, `--keep-quantized`). Received: {preset!r}. "
            "Leave that out, for other presets are loaded as they were saved."
        )
    return preset


def _is_kept(preset):
    """Whether a preset is a file that was converted so."""
    return isinstance(preset, (str, os.PathLike)) and os.path.exists(
        os.path.join(preset, KEPT_WEIGHTS)
    )
