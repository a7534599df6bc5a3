"""Sessions in files, and what ties them to a model."""

import hashlib
import json
import pathlib

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.files import atomic_file

_FORMAT = "keras_nlp_cache.session"
# Numbers of each weight that tell models apart. Reading all takes as long as
# loading the model.
_SAMPLES = 1024


def fingerprint(backbone):
    """A short text that differs between models whose caches differ.

    Args:
        backbone: A backbone of this package.

    Returns:
        str. Made of the calls in the graph, their layers' configuration without
        names, and samples of all weights.
    """
    digest = hashlib.sha256()
    for site in backbone.sites:
        digest.update(type(site.layer).__name__.encode())
        if isinstance(site.layer, keras.layers.Layer):
            config = _without_names(site.layer.get_config())
            digest.update(_json(config).encode())
    for variable in backbone.variables:
        x = ops.convert_to_numpy(variable.value).reshape(-1)
        step = max(1, x.size // _SAMPLES)
        digest.update(f"{variable.shape}{variable.dtype}".encode())
        digest.update(np.ascontiguousarray(x[::step]).tobytes())
    return digest.hexdigest()


def write(path, backbone, token_ids, arrays, conversation=None):
    """Writes a session. See `Session.save()`.

    Args:
        path: str or path that ends in `.safetensors`.
        backbone: The backbone that the cache is of.
        token_ids: int32 array `(T,)`.
        arrays: Pairs of arrays `(1, heads, filled, head_dim)`, or `None`.
        conversation: Optional str, what was said in chat.
    """
    import safetensors.numpy

    if pathlib.Path(path).suffix != ".safetensors":
        raise ValueError(
            "Expected the file of a session to be named *.safetensors. "
            f"Received: {str(path)!r}."
        )
    tensors = {"token_ids": np.asarray(token_ids, "int32")}
    for i, pair in enumerate(arrays or ()):
        for name, x in zip(("key", "value"), pair):
            tensors[f"{name}.{i}"] = _as_bits(x)
    metadata = {
        "format": _FORMAT,
        "model": fingerprint(backbone),
        "dtype": str(arrays[0][0].dtype) if arrays else "",
    }
    if conversation is not None:
        metadata["conversation"] = conversation
    content = safetensors.numpy.save(tensors, metadata)
    with atomic_file.replacing(path) as unfinished:
        unfinished.write_bytes(content)


def read(path, backbone, parse_conversation):
    """Reads what `write()` wrote.

    Args:
        path: str or path.
        backbone: The backbone that is to go on.
        parse_conversation: Function that is called with the `conversation`, if
            there is one, and raises a `ValueError` if it is damaged.

    Returns:
        `(token_ids, arrays, conversation)`, as they were written, the last one
        as it was parsed.

    Raises:
        ValueError: If the file is damaged, no session's, or another model's.
        OSError: If the file cannot be read.
    """
    import safetensors

    # A file that is not there or may not be read is not a damaged one.
    with open(path, "rb"):
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError:
        raise
    except Exception as e:
        # Damaged files raise whatever the library that reads them raises.
        raise ValueError(
            f"Expected {str(path)!r} to be a complete safetensors file. "
            f"Received {type(e).__name__}: {e}. Save the session again."
        ) from e
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"Expected {str(path)!r} to be the file of a session. Received one "
            f"with the metadata {metadata}. Save it with `Session.save()`."
        )
    if metadata.get("model") != fingerprint(backbone):
        raise ValueError(
            f"Expected {str(path)!r} to be of this model. Received a session "
            "of another one, or of other weights. Load it with the model that "
            "it was saved from."
        )
    token_ids = tensors.pop("token_ids", np.zeros((1, 1)))
    if token_ids.ndim != 1:
        raise _damaged(path, "no row of token ids")
    conversation = metadata.get("conversation")
    if conversation is not None:
        try:
            conversation = parse_conversation(conversation)
        except ValueError as e:
            raise _damaged(path, f"a conversation that is damaged ({e})") from e
    if not tensors:
        return token_ids, None, conversation
    arrays = []
    filled = tensors.get("key.0", np.zeros((1, 1, 0, 1))).shape[2]
    for i, (heads, head_dim) in enumerate(backbone.cache_spec):
        pair = tuple(tensors.pop(f"{x}.{i}", None) for x in ("key", "value"))
        for x in pair:
            if x is None or x.shape != (1, heads, filled, head_dim):
                raise _damaged(path, f"block {i} incomplete")
        arrays.append(tuple(_from_bits(x, metadata["dtype"]) for x in pair))
    if tensors or filled > len(token_ids):
        raise _damaged(path, "more keys than tokens or blocks")
    return token_ids, tuple(arrays), conversation


def _damaged(path, what):
    return ValueError(
        f"Expected {str(path)!r} to hold token ids and the keys and values of "
        f"each block. Received a file with {what}. Save the session again."
    )


def _as_bits(x):
    # NumPy has no bfloat16 of its own, so its bits are stored.
    x = np.ascontiguousarray(x)
    return x.view("uint16") if str(x.dtype) == "bfloat16" else x


def _from_bits(x, dtype):
    if dtype != "bfloat16":
        return x
    import ml_dtypes

    return x.view(ml_dtypes.bfloat16)


def _json(config):
    return json.dumps(
        keras.saving.serialize_keras_object(config),
        sort_keys=True,
        default=lambda x: type(x).__name__,
    )


def _without_names(config):
    """A config without the names, which count up from model to model."""
    if isinstance(config, dict):
        return {
            key: _without_names(value)
            for key, value in config.items()
            if key != "name"
        }
    if isinstance(config, (list, tuple)):
        return [_without_names(x) for x in config]
    return config
