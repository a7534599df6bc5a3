"""A second layer over the same weights."""

import keras

# State of its own that a layer keeps beside its attributes: where it stands in
# graphs, what its methods close over, and what Keras tracks of it.
_OWN = frozenset(
    {
        "_inbound_nodes",
        "_layers",
        "_loss_ids",
        "_losses",
        "_losses_override",
        "_metrics",
        "_non_trainable_variables",
        "_outbound_nodes",
        "_seed_generators",
        "_torch_params",
        "_tracker",
        "_trainable_variables",
        "build",
        "quantize",
    }
)


def attributes(layer):
    """The attributes of a layer, by name, without Keras' bookkeeping."""
    found = dict(vars(layer))
    if keras.config.backend() == "torch":
        import torch

        # PyTorch keeps modules apart, and state of its own in each.
        for name in vars(torch.nn.Module()):
            found.pop(name, None)
        found.update(layer._modules)
    return {
        name: value
        for name, value in found.items()
        if name not in _OWN and not name.startswith("_self_")
    }


def share(layer, name=None, **changes):
    """Makes a layer of the same class that shares sub-layers and variables.

    What constructor and `build()` did is not done again, so no weight is
    allocated or copied.

    Args:
        layer: A built layer. It is left as it is.
        name: Optional name. Defaults to that of `layer`.
        **changes: Attributes in which the new layer differs.

    Returns:
        The new layer.
    """
    new = type(layer).__new__(type(layer))
    keras.layers.Layer.__init__(new, name=name or layer.name)
    for attribute, value in attributes(layer).items():
        if attribute != "_name":
            setattr(new, attribute, changes.pop(attribute, value))
    for attribute, value in changes.items():
        setattr(new, attribute, value)
    new._lock_state()
    return new


def sublayers(layer, path=()):
    """Walks the layers inside a layer.

    Yields:
        `(path, layer)`, where `path` is a tuple of attribute names.
    """
    for name, value in attributes(layer).items():
        if isinstance(value, keras.layers.Layer):
            yield (*path, name), value
            yield from sublayers(value, (*path, name))
