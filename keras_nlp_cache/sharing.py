"""A second layer over the same weights."""

import functools

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
        "_shared_from",
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
    for name in _backend_state():
        found.pop(name, None)
    # Where PyTorch keeps modules.
    found.update(vars(layer).get("_modules", {}))
    return {name: value for name, value in found.items() if name not in _OWN}


@functools.cache
def _backend_state():
    """Names under which the backend keeps state of its own in a layer."""
    if keras.config.backend() == "torch":
        import torch

        return tuple(vars(torch.nn.Module()))
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        trackable = tf.__internal__.tracking.AutoTrackable()
        trackable._maybe_initialize_trackable()
        return ("_tracked", *vars(trackable))
    return ()


class SharedFrom:
    """How `share()` made a layer: from which one, with which changes."""

    def __init__(self, layer, changes):
        self.layer = layer
        self.changes = changes


def share(layer, /, name=None, **changes):
    """Makes a layer of the same class that shares sub-layers and variables.

    What constructor and `build()` did is not done again, so no weight is
    allocated or copied.

    Args:
        layer: A built layer. It is left as it is.
        name: Optional name. Defaults to that of `layer`.
        **changes: Attributes that hold other layers in the new one.

    Returns:
        The new layer. `shared_from()` tells how it was made.
    """
    new = type(layer).__new__(type(layer))
    keras.layers.Layer.__init__(new, name=name or layer.name)
    for attribute, value in {**attributes(layer), **changes}.items():
        if attribute != "name":
            setattr(new, attribute, value)
    new._lock_state()
    # Not for Keras to track, or the layers that were replaced would count.
    object.__setattr__(new, "_shared_from", SharedFrom(layer, changes))
    return new


def shared_from(layer):
    """The `SharedFrom` of a layer that `share()` made, `None` for others."""
    return getattr(layer, "_shared_from", None)


def sublayers(layer, path=()):
    """Walks the layers inside a layer.

    Yields:
        `(path, layer)`, where `path` is a tuple of attribute names.
    """
    for name, value in attributes(layer).items():
        if isinstance(value, keras.layers.Layer):
            yield (*path, name), value
            yield from sublayers(value, (*path, name))
