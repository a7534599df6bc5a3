"""Sessions in files, and what ties them to a model."""

import hashlib
import json
import pathlib

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.moving import Tokens
from keras_nlp_cache.cache.policies.encoded import Encoded
from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.files import atomic_file
from keras_nlp_cache.generate.prompts import check_source
from keras_nlp_cache.generate.session_images import SessionImages

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


def write(
    path,
    backbone,
    token_ids,
    tokens,
    images,
    conversation=None,
    source=None,
):
    """Writes a session. See `Session.save()`.

    Args:
        path: str or path that ends in `.safetensors`.
        backbone: The backbone that the cache is of.
        token_ids: int32 array `(T,)`.
        tokens: From `moving.take_out()`, or `None`.
        images: `SessionImages`.
        conversation: Optional str, what was said in chat.
        source: Optional dictionary of arrays, what an encoder reads.
    """
    import safetensors.numpy

    if pathlib.Path(path).suffix != ".safetensors":
        raise ValueError(
            "Expected the file of a session to be named *.safetensors. "
            f"Received: {str(path)!r}."
        )
    tensors, dtype = {"token_ids": np.asarray(token_ids, "int32")}, ""
    for name, x in (source or {}).items():
        tensors[f"source.{name}"] = np.ascontiguousarray(x)
    for i, pair in enumerate(tokens or ()):
        for name, some in zip(("key", "value"), pair):
            if is_encoded(some):
                tensors[f"{name}.{i}.mask"] = np.ascontiguousarray(some.mask)
            elif len(some.slots) and some.slots[-1] + 1 > len(some.slots):
                tensors[f"{name}.{i}.slots"] = some.slots
            if isinstance(some.stored, Int8):
                tensors[f"{name}.{i}.scale"] = _as_bits(some.stored.scale)
                tensors[f"{name}.{i}"] = _as_bits(some.stored.values)
            else:
                if not isinstance(backbone.cache_spec[i], StateShapes):
                    dtype = str(some.stored.dtype)
                tensors[f"{name}.{i}"] = _as_bits(some.stored)
    if images:
        tensors["images.places"] = images.places
        tensors["images.sizes"] = images.sizes
        tensors["images.embeddings"] = ops.convert_to_numpy(
            ops.cast(images.embeddings, "float32")
        )
    metadata = {
        "format": _FORMAT,
        "model": fingerprint(backbone),
        "dtype": dtype,
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
        `(token_ids, tokens, images, conversation, source)`, as they were
        written, the conversation as it was parsed.

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
    images = _images(path, tensors, backbone, len(token_ids))
    conversation = metadata.get("conversation")
    if conversation is not None:
        try:
            conversation = parse_conversation(conversation)
        except ValueError as e:
            raise _damaged(path, f"a conversation that is damaged ({e})") from e
    source = _source(path, tensors, backbone)
    if not tensors:
        return token_ids, None, images, conversation, source
    tokens = tuple(
        tuple(
            _tokens(path, tensors, f"{name}.{i}", spec, metadata["dtype"])
            for name in ("key", "value")
        )
        for i, spec in enumerate(backbone.cache_spec)
    )
    ends = {
        int(x.slots[-1]) if len(x.slots) else -1
        for pair in tokens
        for x in pair
        if not is_encoded(x)
    }
    if tensors or max(ends) >= len(token_ids):
        raise _damaged(path, "more keys than tokens or blocks")
    if len(ends) > 1:
        raise _damaged(path, "a block incomplete")
    return token_ids, tokens, images, conversation, source


def _images(path, tensors, backbone, count):
    """Takes the `SessionImages` of some tokens out of the tensors of a file."""
    found = SessionImages(
        *(tensors.pop(f"images.{name}", None) for name in SessionImages._fields)
    )
    missing = [x is None for x in found]
    if all(missing):
        return SessionImages()
    if not getattr(backbone, "sees", False):
        raise _damaged(path, "images, which the model does not read")
    if any(missing) or not _fit(found, backbone.cuts.images.tower, count):
        raise _damaged(path, "images that do not fit the text")
    return found


def _fit(images, tower, count):
    """Whether images are what a tower returns, in the places of some tokens.

    Args:
        images: `SessionImages`, of whatever shape and values.
        tower: Symbolic tensor `(..., tokens, hidden_dim)`. How many tokens an
            image becomes, not every tower says.
        count: int. How many tokens there are. The last is of no image.
    """
    places, x, sizes = images
    of_each, dim = tower.shape[-2:]
    if (places.ndim, x.ndim, sizes.shape[1:]) != (1, 2, (2,)):
        return False
    return (
        len(sizes) > 0
        and images.are_whole()
        and (of_each is None or (sizes.prod(axis=1) == of_each).all())
        and x.shape == (len(places), dim)
        and 0 <= places[0] <= places[-1] < count - 1
    )


def _source(path, tensors, backbone):
    """Takes what an encoder reads out of the tensors of a file."""
    if backbone.roles.source is None:
        return None
    names = backbone.roles.read_by_encoder
    source = {name: tensors.pop(f"source.{name}", None) for name in names}
    for name in backbone.roles.beside_source:
        if source[name] is None:
            del source[name]
    if any(x is None for x in source.values()):
        raise _damaged(path, "nothing for the encoder to read")
    try:
        check_source(source, backbone, rows=1)
    except ValueError as e:
        raise _damaged(path, f"something else for the encoder ({e})") from e
    return source


def _tokens(path, tensors, name, spec, dtype):
    """Takes the `Tokens` of some name out of the tensors of a file.

    Or the `Encoded`, if that is what there is.
    """
    if isinstance(spec, StateShapes):
        slots = tensors.pop(f"{name}.slots", np.arange(1))
        x, shape = tensors.pop(name, None), getattr(spec, name.split(".")[0])
        if x is None or x.shape != (1, *shape) or slots.shape != (1,):
            raise _damaged(path, f"block {name.split('.')[1]} incomplete")
        return Tokens(slots, x)
    heads, head_dim = spec
    x, scale, slots, mask = (
        tensors.pop(name + end, None)
        for end in ("", ".scale", ".slots", ".mask")
    )
    count = 0 if x is None or x.ndim != 4 else x.shape[2]
    slots = np.arange(count) if slots is None else slots
    if x is None or x.shape != (1, heads, count, head_dim):
        raise _damaged(path, f"block {name.split('.')[1]} incomplete")
    if slots.shape != (count,) or (np.diff(slots) <= 0).any():
        raise _damaged(path, f"other slots than those of {name}")
    if scale is None:
        stored = _from_bits(x, dtype)
    elif scale.shape == (1, heads, count, 1):
        stored = Int8(x, scale)
    else:
        raise _damaged(path, f"{name}.scale incomplete")
    if mask is None:
        return Tokens(slots, stored)
    if mask.shape != (1, 1, 1, count):
        raise _damaged(path, f"{name}.mask incomplete")
    return Encoded(stored, mask)


def _damaged(path, what):
    return ValueError(
        f"Expected {str(path)!r} to hold token ids and the keys and values of "
        f"each block. Received a file with {what}. Save the session again."
    )


def _as_bits(x):
    # Memory is written as it lies. NumPy has no bfloat16 of its own, so its
    # bits are stored.
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
