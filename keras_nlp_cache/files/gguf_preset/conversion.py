"""Converts a GGUF file to a Hugging Face directory, and keeps that.

Or to one whose matrices are as the file has them: its weights are then in
`KEPT_WEIGHTS`, where nothing else looks for them, and its config says of which
format they are under `KEPT`.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile

import filelock
import numpy as np

from keras_nlp_cache.files import gguf_reader
from keras_nlp_cache.files.cache_folder import cache_folder
from keras_nlp_cache.files.gguf_preset import architectures
from keras_nlp_cache.files.gguf_preset import stored
from keras_nlp_cache.files.gguf_preset import vocabulary

# To be raised when the same file is to be converted to something else.
_VERSION = 2
# What is read of a file to tell it from others: 1 MiB, wherever it is large.
_SAMPLES = 16
_SAMPLE_BYTES = 2**16

KEPT = "kept_quantized"
KEPT_WEIGHTS = "kept.safetensors"


def converted(path, folder=None, keep_quantized=False):
    """Returns the path of a converted GGUF file, converting it if need be.

    The directory appears under its name when it is complete, and not before:
    a conversion that is cut off leaves nothing that could be mistaken for it.
    A file that was changed has another name there.

    Args:
        path: Path of the file.
        folder: Optional path. Defaults to `cache_folder()`.
        keep_quantized: bool. Whether matrices of the formats in
            `stored.FORMATS` are to stay as they are, and not be widened.

    Returns:
        A path that `CausalLM.from_preset()` takes, as a string.

    Raises:
        ImportError: If the package `gguf` is missing.
        OSError: If the file cannot be read, or the folder not be written.
        ValueError: If the file is damaged, or of a model that this package
            does not cover, or has nothing to keep.
    """
    path = pathlib.Path(path)
    name = f"{path.stem[:64]}-{_fingerprint(path)}"
    if keep_quantized:
        name += "-kept"
    target = pathlib.Path(folder or cache_folder()) / name
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{name}.lock"):
        if not target.is_dir():
            convert = _convert_kept if keep_quantized else _convert
            _convert_into(target, path, convert)
    return str(target)


def _fingerprint(path):
    """Names what a file holds, without reading all of many gigabytes.

    Whoever changes a part that is not read here changes the time, too.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        seen = hashlib.sha256(
            f"{_VERSION} {status.st_size} {status.st_mtime_ns}".encode()
        )
        last = max(status.st_size - _SAMPLE_BYTES, 0)
        for i in range(_SAMPLES):
            file.seek(last * i // (_SAMPLES - 1))
            seen.update(file.read(_SAMPLE_BYTES))
    return seen.hexdigest()[:16]


def _convert_into(target, path, convert):
    prefix = f".{target.name}.unfinished-"
    # We hold the lock, so whatever is there was left by a process that died.
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    unfinished = tempfile.mkdtemp(prefix=prefix, dir=target.parent)
    try:
        print(f"Converting {path.name} once, into {target}", file=sys.stderr)
        convert(path, unfinished)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(path, folder):
    """Writes a GGUF file as a Hugging Face directory."""
    model = architectures.Model(path, _read(path))
    _write(folder, model, model.config)
    _write_safetensors(
        pathlib.Path(folder, "model.safetensors"), map(_widened, model.tensors)
    )


def _convert_kept(path, folder):
    """Writes one whose matrices are as the file has them."""
    model = architectures.Model(path, _read(path))
    kept = {
        x.name: {"format": x.kind, "transposed": x.is_transposed}
        for x in model.tensors
        if x.kind is not None
    }
    if not kept:
        found = sorted({x.tensor_type.name for x in model.stored.values()})
        model.refuse(
            f"matrices of the formats {list(stored.FORMATS)}, which can be "
            "kept",
            f"a file of {found}",
            "Load it without `keep_quantized` (`--keep-quantized`)",
        )
    _write(folder, model, {**model.config, KEPT: kept})
    _write_safetensors(
        pathlib.Path(folder, KEPT_WEIGHTS),
        (
            _as_stored(x) if x.name in kept else _widened(x)
            for x in model.tensors
        ),
    )


def _write(folder, model, config):
    """Writes all but the weights."""
    folder = pathlib.Path(folder)
    vocabulary.write(folder, model)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _read(path):
    try:
        reader = gguf_reader.read(path)
    except ImportError as e:
        raise ImportError(
            f"Reading {str(path)!r} needs the package `gguf`. Run "
            "`pip install 'keras-nlp-cache[demo]'`."
        ) from e
    except OSError:
        raise
    except Exception as e:
        # Damaged files raise whatever the library that reads them raises.
        raise ValueError(
            f"Expected {str(path)!r} to be a complete GGUF file. Received "
            f"{type(e).__name__}: {e}. Copy or download it again."
        ) from e
    if reader.byte_order != "I":
        raise ValueError(
            f"Expected {str(path)!r} to have the byte order of this machine. "
            "Received the other one. Convert it with `gguf-convert-endian`."
        )
    return reader


def _widened(tensor):
    """What is written of a tensor that becomes float32."""
    return (
        tensor.name,
        "F32",
        tensor.shape,
        lambda: np.ascontiguousarray(tensor.read(), "<f4"),
    )


def _as_stored(tensor):
    """What is written of a tensor that stays as it is."""
    shape = tensor.model.stored[tensor.theirs].data.shape
    return (
        tensor.name,
        "U8",
        tuple(int(x) for x in shape),
        lambda: np.ascontiguousarray(tensor.read_stored()),
    )


def _write_safetensors(path, tensors):
    """Writes tensors, with no more than one in memory.

    Args:
        path: Path of the file.
        tensors: Iterable of `(name, dtype, shape, read)`. `read()` returns the
            array, with the dtype by the name that safetensors gives it.
    """
    from tqdm import auto as tqdm

    tensors = list(tensors)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, _ in tensors:
        size = {"F32": 4, "U8": 1}[dtype] * math.prod(shape)
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with (
        open(path, "wb") as file,
        tqdm.tqdm(
            total=end, desc="Converting", unit="B", unit_scale=True
        ) as bar,
    ):
        file.write(len(header).to_bytes(8, "little") + header)
        for name, _, shape, read in tensors:
            x = read()
            # The header has promised this.
            assert x.shape == shape, (name, x.shape)
            file.write(x)
            bar.update(x.nbytes)
