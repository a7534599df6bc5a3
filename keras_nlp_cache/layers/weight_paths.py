"""The paths of weights, by which they are told apart outside of a model.

Keras gives a weight the path of the layer in which it is made. What surgery
puts inside a block is made in the scope of that block. Where two weights still
came to have one path, the one that came later is given another.
"""

import contextlib
import re

import keras
from keras.src.utils import naming


@contextlib.contextmanager
def scope(path):
    """In this scope, layers that are built get paths that begin with `path`.

    Args:
        path: str, such as `"transformer_layer_0/self_attention"`. May be empty.
    """
    with contextlib.ExitStack() as stack:
        for name in filter(None, (path or "").split("/")):
            stack.enter_context(keras.name_scope(name))
        yield


def parent(path):
    """What a path has before its last name."""
    return path.rpartition("/")[0] if path else ""


def unused(path, taken):
    """The path, or one with a number at the end of its last layer's name."""
    before, _, name = path.rpartition("/")
    unused, i = path, 0
    while unused in taken:
        i += 1
        unused = f"{before}_{i}/{name}" if before else f"{name}_{i}"
    return unused


def count_within(block):
    """Names layers inside a block as in a block that is all alone.

    Keras names what upstream does not by the class, with a number that counts
    all such layers of the process. The paths would be other ones in each model
    that is built, and whatever is saved by them would not be found again.

    Args:
        block: A layer that is built.
    """
    layers = block._flatten_layers(include_self=False)
    # As attributes are: not by Keras, whatever number there is.
    named = {
        id(layer)
        for outer in (block, *layers)
        for attribute, layer in _attributes(outer).items()
        if isinstance(layer, keras.layers.Layer) and layer.name == attribute
    }
    taken, paths = set(), {}
    for layer in layers:
        name, before = _automatic_name(layer), layer.path
        if name is None or not before or id(layer) in named:
            continue
        inside, i = parent(before), 0
        layer.name = name
        while f"{inside}/{layer.name}" in taken:
            i += 1
            layer.name = f"{name}_{i}"
        taken.add(f"{inside}/{layer.name}")
        if before != f"{inside}/{layer.name}":
            paths[before] = f"{inside}/{layer.name}"

    def moved(path):
        for before in sorted(paths, key=len, reverse=True):
            if path == before or path.startswith(f"{before}/"):
                path = paths[before] + path[len(before) :]
        return path

    if paths:
        for layer in layers:
            if layer.path:
                layer._path = moved(layer.path)
                layer._parent_path = parent(layer.path)
        found = {id(v): (v, moved(v.path)) for v in block.variables}
        assign(block, found)


def _attributes(layer):
    """The attributes of a layer, with those that PyTorch keeps elsewhere."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def pattern(path, layers):
    """A regular expression for a path, however Keras may count.

    Args:
        path: str.
        layers: Dictionary from paths to layers.

    Returns:
        str. The path itself if all on its way have names of their own.
    """
    names = path.split("/")
    for i, name in enumerate(names):
        layer = layers.get("/".join(names[: i + 1]))
        if layer is not None and _automatic_name(layer) == name:
            names[i] = rf"{name}(_\d+)?"
    return "/".join(names)


def _automatic_name(layer):
    """The name that Keras gives a layer of that class, if it has this name."""
    name = naming.to_snake_case(type(layer).__name__)
    return name if re.fullmatch(rf"{name}(_\d+)?", layer.name) else None


def make_distinct(model, kept):
    """Gives each weight of a model a path of its own.

    Args:
        model: A model.
        kept: Weights that keep their paths, such as those of the model that
            this one was made from.
    """
    kept = {id(w) for w in kept}
    weights = sorted(model.weights, key=lambda w: id(w) not in kept)
    taken, paths = set(), {}
    for weight in weights:
        if weight.path in taken and id(weight) not in kept:
            paths[id(weight)] = unused(weight.path, taken)
        taken.add(paths.get(id(weight), weight.path))
    assign(model, {id(w): (w, paths[id(w)]) for w in weights if id(w) in paths})


def assign(model, paths):
    """Gives weights of a model other paths.

    Args:
        model: A model.
        paths: Dictionary from the `id()` of weights to `(weight, path)`.
    """
    paths = {i: (w, path) for i, (w, path) in paths.items() if w.path != path}
    if not paths:
        return
    for weight, path in paths.values():
        weight._path = path
    for layer in model._flatten_layers():
        # PyTorch finds parameters by their paths, once it was asked for them.
        if "_torch_params" in getattr(layer, "_modules", ()):
            if any(id(w) in paths for w in layer.variables):
                del layer._torch_params
