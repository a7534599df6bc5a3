"""The paths of weights, by which they are told apart outside of a model.

Keras gives a weight the path of the layer in which it is made. What surgery
puts inside a block is made in the scope of that block. Where two weights still
came to have one path, the one that came later is given another.
"""

import contextlib

import keras


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
