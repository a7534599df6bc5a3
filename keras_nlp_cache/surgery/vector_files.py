"""Control vectors in files.

Both formats hold one float32 tensor `direction.<block>` for each block. The
keys of the GGUF file are those that `repeng` and llama.cpp read and write.
"""

import importlib
import pathlib
import re

from keras_nlp_cache.files import atomic_file
from keras_nlp_cache.files import gguf_reader

_FORMAT = "control_vector"
_ARCHITECTURE = "controlvector"
_TENSOR = re.compile(r"direction\.(0|[1-9][0-9]*)")


def require(module, package):
    """Imports an optional dependency.

    Args:
        module: str. What to import.
        package: str. What the package that contains it is called.

    Raises:
        ImportError: If it is not installed, with how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            f"This use of control vectors needs the package `{package}`. Run "
            "`pip install 'keras-nlp-cache[steer]'`."
        ) from e


def check_path(path):
    """Checks that a file name says which format the file is to have.

    Raises:
        ValueError: If its suffix is of none of the formats.
    """
    _format(path)


def write(path, directions, model_hint):
    """Writes a file, or leaves an older one at its place as it was.

    Args:
        path: Path that ends in `.safetensors` or `.gguf`.
        directions: Dictionary from block indices to float32 arrays.
        model_hint: str.

    Raises:
        ValueError: If the suffix is of none of the formats.
        OSError: If the file cannot be written.
    """
    writer, _ = _format(path)
    tensors = {f"direction.{i}": x for i, x in sorted(directions.items())}
    with atomic_file.replacing(path) as unfinished:
        writer(unfinished, tensors, model_hint)


def read(path):
    """Reads what `write()` or `repeng` wrote.

    Args:
        path: Path that ends in `.safetensors` or `.gguf`.

    Returns:
        `(directions, model_hint)`. The arrays are as they are in the file,
        their shapes still to be checked.

    Raises:
        ValueError: If the suffix is of none of the formats, or the file is
            damaged or no control vector.
        OSError: If the file cannot be read.
    """
    _, reader = _format(path)
    # A file that is not there or may not be read is not a damaged one.
    with open(path, "rb"):
        pass
    try:
        tensors, model_hint = reader(path)
    except (ImportError, OSError):
        raise
    except _NoControlVector as e:
        raise ValueError(
            f"Expected {str(path)!r} to be the file of a control vector. "
            f"Received {e}. Save it again with `ControlVector.save()` or "
            "`repeng`."
        ) from e
    except Exception as e:
        # Damaged files raise whatever the library that reads them raises.
        raise ValueError(
            f"Expected {str(path)!r} to be a complete file in the format of "
            f"its suffix. Received {type(e).__name__}: {e}. Save or copy the "
            "control vector again."
        ) from e
    if not tensors:
        raise ValueError(
            f"Expected {str(path)!r} to hold a tensor `direction.<block>` for "
            "each block. Received a file without tensors. Save the control "
            "vector again."
        )
    directions = {}
    for name, x in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(
                f"Expected the tensors in {str(path)!r} to be named "
                f"`direction.<block>`. Received: {name!r}. Is it another file "
                "than that of a control vector?"
            )
        directions[int(match[1])] = x
    return directions, model_hint


class _NoControlVector(Exception):
    """What a file holds in place of a control vector."""


def _format(path):
    suffix = pathlib.Path(path).suffix
    if suffix not in _FORMATS:
        raise ValueError(
            "Expected the file of a control vector to be named as one of "
            f"{', '.join('*' + x for x in _FORMATS)}. Received: "
            f"{str(path)!r}. Choose one of these suffixes."
        )
    return _FORMATS[suffix]


def _write_safetensors(path, tensors, model_hint):
    safetensors = require("safetensors.numpy", "safetensors")
    metadata = {"format": _FORMAT, "model_hint": model_hint}
    path.write_bytes(safetensors.save(tensors, metadata))


def _read_safetensors(path):
    safetensors = require("safetensors", "safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise _NoControlVector(
                f"one with the metadata {metadata}, where 'format' should be "
                f"{_FORMAT!r}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return tensors, metadata.get("model_hint")


def _write_gguf(path, tensors, model_hint):
    gguf = require("gguf", "gguf")
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(tensors))
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _read_gguf(path):
    gguf = require("gguf", "gguf")
    reader = gguf_reader.read(path)

    def text(key):
        field = reader.get_field(key)
        if field is None or field.types != [gguf.GGUFValueType.STRING]:
            raise _NoControlVector(f"one without a string {key!r}")
        return field.contents()

    architecture = text("general.architecture")
    if architecture != _ARCHITECTURE:
        raise _NoControlVector(
            f"one of architecture {architecture!r}, where {_ARCHITECTURE!r} "
            "was expected"
        )
    model_hint = text(f"{_ARCHITECTURE}.model_hint")
    # Copied, since they are views of a file that may be replaced.
    tensors = {x.name: x.data.copy() for x in reader.tensors}
    return tensors, model_hint


_FORMATS = {
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".gguf": (_write_gguf, _read_gguf),
}
