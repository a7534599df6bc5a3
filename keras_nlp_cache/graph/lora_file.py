"""Adapters in a file of their own: Keras' LoRA, and what surgery inserted.

Keras' are where upstream puts them, by the place of their layers. The others
are in a group of their own, by the paths of their weights.
"""

import h5py
from keras import ops

from keras_nlp_cache.files import atomic_file
from keras_nlp_cache.layers import weight_paths

_GROUP = "adapters"


class Adapter:
    """Mixin for layers whose weights `down` and `up` are an adapter's."""


def save(backbone, path, save_keras_lora):
    """Writes the adapters of a backbone, or leaves an older file as it was.

    Args:
        backbone: A backbone.
        path: Path that ends in `.lora.h5`.
        save_keras_lora: Function that writes those of `enable_lora()`.

    Raises:
        ValueError: If there are none, or the path ends in something else.
    """
    if not str(path).endswith(".lora.h5"):
        raise ValueError(
            "Expected the file of adapters to be named as `*.lora.h5`. "
            f"Received: {str(path)!r}."
        )
    adapters = _inserted(backbone)
    enabled = getattr(backbone, "_lora_enabled_layers", [])
    if not adapters and not enabled:
        raise ValueError(
            "Expected a model with adapters. Received: "
            f"{backbone.name!r}, which has none. Call `enable_lora()` or "
            "`surgery.add_lora()` first."
        )
    with atomic_file.replacing(path) as unfinished:
        if enabled:
            save_keras_lora(str(unfinished))
        with h5py.File(unfinished, "a") as file:
            for name, adapter in adapters.items():
                group = file.create_group(f"{_GROUP}/{name}")
                group.attrs["scale"] = adapter.alpha / adapter.rank
                for key in ("down", "up"):
                    group[key] = _array(getattr(adapter, key))


def load(backbone, path, load_keras_lora):
    """Reads what `save()` or upstream wrote, all of it or nothing.

    Args:
        backbone: A backbone with as many adapters of the same shapes. Those of
            `enable_lora()` are added if it has none of them.
        path: Path of the file.
        load_keras_lora: Function that reads those of `enable_lora()`.

    Raises:
        ValueError: If the file and the backbone do not fit.
    """
    adapters = _inserted(backbone)
    with h5py.File(path, "r") as file:
        if "lora" not in file and _GROUP not in file:
            raise ValueError(
                f"Expected {str(path)!r} to be a file of adapters. Received "
                f"one with {sorted(file)} in it. Write it by "
                "`save_lora_weights()`."
            )
        saved = {}
        if _GROUP in file:
            file[_GROUP].visititems(
                lambda name, group: (
                    saved.update({name: _read(group)})
                    if "scale" in group.attrs
                    else None
                )
            )
        _compare(path, "inserted adapters", saved, adapters)
        for name, adapter in adapters.items():
            down, up, scale = saved[name]
            ours = (
                tuple(adapter.down.shape),
                tuple(adapter.up.shape),
                adapter.alpha / adapter.rank,
            )
            if (down.shape, up.shape, scale) != ours:
                raise ValueError(
                    f"Expected an adapter at {name!r} of rank {adapter.rank} "
                    f"and `alpha` {adapter.alpha}, from {ours[0][0]} to "
                    f"{ours[1][1]} numbers, as the model has. Received in "
                    f"{str(path)!r} one of rank {down.shape[1]} and `alpha` "
                    f"{scale * down.shape[1]:g}, from {down.shape[0]} to "
                    f"{up.shape[1]} numbers."
                )
        _check_keras_lora(backbone, path, file)
        has_keras_lora = "lora" in file
    if has_keras_lora:
        load_keras_lora(str(path))
    for name, adapter in adapters.items():
        down, up, _ = saved[name]
        adapter.down.assign(down)
        adapter.up.assign(up)


def _check_keras_lora(backbone, path, file):
    enabled = getattr(backbone, "_lora_enabled_layers", [])
    layers = [x for x in backbone._flatten_layers(False) if x.weights]
    saved = {}
    if "lora" in file:
        saved = {int(x): file["lora"][x] for x in file["lora"] if x.isdigit()}
        rank = int(file["lora/vars/rank"][()])
        if enabled and rank != backbone._lora_rank:
            raise ValueError(
                f"Expected LoRA of rank {backbone._lora_rank}, which the model "
                f"was given by `enable_lora()`. Received in {str(path)!r}: "
                f"rank {rank}."
            )
        if not enabled:
            names = backbone.default_lora_layer_names()
            enabled = [
                i
                for i, layer in enumerate(layers)
                if layer.name in names and hasattr(layer, "enable_lora")
            ]
    what = "layers with LoRA by `enable_lora()`, counted from 0,"
    _compare(path, what, saved, dict.fromkeys(enabled))
    for i in enabled:
        for key in ("lora_kernel_a", "lora_kernel_b"):
            # There is none before it is enabled.
            expected = getattr(layers[i], key, None)
            received = saved[i]["vars"][key].shape
            if expected is not None and tuple(expected.shape) != received:
                raise ValueError(
                    f"Expected `{key}` of layer {layers[i].path!r} to be of "
                    f"shape {tuple(expected.shape)}. Received in "
                    f"{str(path)!r}: {received}."
                )


def _compare(path, what, saved, has):
    missing = [x for x in has if x not in saved]
    unknown = [x for x in saved if x not in has]
    if missing or unknown:
        raise ValueError(
            f"Expected {str(path)!r} to hold the {what} that the model has. "
            f"Received a file without {missing}, and with {unknown}, which "
            "the model has not. Edit the model as the one that was saved."
        )


def _inserted(backbone):
    # It is an edit of this package's, which is built on backbones.
    return {
        weight_paths.parent(layer.down.path): layer
        for layer in backbone._flatten_layers(include_self=False)
        if isinstance(layer, Adapter)
    }


def _read(group):
    return group["down"][()], group["up"][()], float(group.attrs["scale"])


def _array(weight):
    # HDF5 has no bfloat16.
    x = ops.convert_to_numpy(weight)
    return x.astype("float32") if x.dtype.name == "bfloat16" else x
