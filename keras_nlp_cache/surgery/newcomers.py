"""Layers that another model has, as this one can have them.

Names of layers are unique in a model, and so are the paths of weights. A layer
that has both free is shared. One that has not comes under another name, over
copies of its weights.
"""

import keras

from keras_nlp_cache.graph.saving import weights_of
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers.sharing import copy
from keras_nlp_cache.layers.sharing import share


class Newcomers:
    """What the layers that are put into a model are called, and stand for.

    Args:
        backbone: The backbone that they are put into.
        leaving: Sites of it whose layers make room.
    """

    def __init__(self, backbone, leaving=()):
        gone = {id(site.layer) for site in leaving} - {
            id(site.layer) for site in backbone.sites if site not in leaving
        }
        self._names = set()
        self._paths = {}
        self._known = {}
        for layer in backbone.operations:
            if id(layer) not in gone:
                self._add(layer, layer)

    def __call__(self, layer):
        """What to call in the model for a layer of whatever origin."""
        if id(layer) not in self._known:
            self._add(layer, self._fitting(layer))
        return self._known[id(layer)][1]

    def _add(self, layer, fitting):
        # With the layer, for it not to lend its id to another.
        self._known[id(layer)] = layer, fitting
        self._known[id(fitting)] = fitting, fitting
        self._names.add(fitting.name)
        for weight in weights_of(fitting):
            self._paths.setdefault(weight.path, weight)

    def _fitting(self, layer):
        named = layer.name in self._names
        # Keras explains two new layers of one name.
        if named and not layer._inbound_nodes:
            return layer
        # What is not built yet cannot be copied. Its weights, if it has some
        # already, get other paths when the model is made.
        built = getattr(layer, "built", True)
        if built and conflicts(layer, self._paths):
            return copy(layer, self._unused(layer.name))
        if not named:
            return layer
        if isinstance(layer, keras.layers.Layer):
            return share(layer, self._unused(layer.name))
        config = {**layer.get_config(), "name": self._unused(layer.name)}
        return type(layer).from_config(config)

    def _unused(self, name):
        unused, i = name, 0
        while unused in self._names or any(
            path.startswith(f"{unused}/") for path in self._paths
        ):
            i += 1
            unused = f"{name}_{i}"
        return unused


def conflicts(layer, paths):
    """Whether a layer has weights whose paths other weights have.

    Args:
        layer: A layer or another operation.
        paths: Dictionary from paths to weights.
    """
    return any(paths.get(w.path, w) is not w for w in weights_of(layer))


def inside(layer, model, old):
    """What stands for a layer that is put inside a block, in place of another.

    Args:
        layer: The layer. It may be one from inside a block of another model.
        model: The model.
        old: The layer that it replaces.

    Returns:
        The layer, or a copy if it is another model's and has weights whose
        paths are taken.
    """
    if not isinstance(layer, keras.layers.Layer) or "/" not in (
        layer.path or ""
    ):
        return layer
    gone = {id(w) for w in old.weights}
    paths = {w.path: w for w in model.weights if id(w) not in gone}
    if not conflicts(layer, paths):
        return layer
    return copy(layer, layer.name, weight_paths.parent(old.path))
