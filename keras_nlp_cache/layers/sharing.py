"""A second layer over the same weights, or over copies of them."""

import functools

import keras
from keras import ops

from keras_nlp_cache.layers import weight_paths

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


def copy(layer, name, scope=""):
    """Makes a layer of the same class over weights of its own.

    What `share()` gave the layer is copied as such, and quantized weights as
    they are, neither of which a constructor could do.

    Args:
        layer: A built layer. It is left as it is.
        name: str. Name of the copy.
        scope: str. The path of what the copy is to be inside of. The paths of
            its weights begin with it.

    Returns:
        The new layer.
    """
    return _Copies(layer, name, scope).of(layer)


class _Copies:
    """Copies of layers and variables, each made once."""

    def __init__(self, layer, name, scope):
        self._before = layer.path or layer.name
        self._name = name
        self._scope = scope
        self._path = f"{scope}/{name}" if scope else name
        self._made = {}

    def of(self, x):
        if type(x) in (tuple, list) or isinstance(x, list):
            return type(x)(self.of(y) for y in x)
        if isinstance(x, dict):
            return {key: self.of(y) for key, y in x.items()}
        for cls, make in (
            (keras.layers.Layer, self._layer),
            (keras.Variable, self._variable),
            (keras.random.SeedGenerator, self._seed_generator),
        ):
            if isinstance(x, cls):
                if id(x) not in self._made:
                    # What is kept may not lend its id to another.
                    self._made[id(x)] = x, make(x)
                return self._made[id(x)][1]
        return x

    def _layer(self, layer):
        new = type(layer).__new__(type(layer))
        # Of what `share()` made, the layer that it was made from, too.
        outermost = (layer.path or layer.name) == self._before
        name = self._name if outermost else layer.name
        keras.layers.Layer.__init__(new, name=name)
        for attribute, value in attributes(layer).items():
            if attribute not in ("name", "_path", "_parent_path"):
                setattr(new, attribute, self.of(value))
        new._path = self._moved(layer.path)
        new._parent_path = weight_paths.parent(new._path)
        new._lock_state()
        origin = shared_from(layer)
        if origin is not None:
            origin = SharedFrom(self.of(origin.layer), self.of(origin.changes))
            object.__setattr__(new, "_shared_from", origin)
        return new

    def _moved(self, path):
        """The path in the copy of what has a path in the layer."""
        if path is None:
            return None
        if path == self._before or path.startswith(f"{self._before}/"):
            return self._path + path[len(self._before) :]
        return f"{self._path}/{path}"

    def _variable(self, variable):
        path = self._moved(variable.path)
        with weight_paths.scope(weight_paths.parent(path)):
            new = keras.Variable(
                ops.copy(variable.value),
                dtype=variable.dtype,
                trainable=variable.trainable,
                autocast=variable._autocast,
                aggregation=variable.aggregation,
                name=variable.name,
            )
        new._path = path
        for attribute in (
            "regularizer",
            "constraint",
            "overwrite_with_gradient",
        ):
            setattr(new, attribute, getattr(variable, attribute))
        return new

    def _seed_generator(self, generator):
        new = keras.random.SeedGenerator(
            generator.get_config()["seed"], name=generator.name
        )
        new.state = self.of(generator.state)
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
