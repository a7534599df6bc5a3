"""The graph of an edited backbone, as part of its config.

A backbone is built from the arguments of its constructor, which know nothing of
edits. So an edited backbone is saved as these and the calls that its graph is
made of, and built by constructing the backbone and replaying the calls. Layers
that the constructor builds are referred to by number; what was inserted comes
with a config of its own.
"""

import collections
import contextlib
import contextvars

import keras
from keras import tree

from keras_nlp_cache.blocks.replaying import replaying
from keras_nlp_cache.graph.calling import dense
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers import whole_config
from keras_nlp_cache.layers.block_call import collecting_carried
from keras_nlp_cache.layers.block_call import collecting_taps
from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.layers.sharing import shared_from
from keras_nlp_cache.layers.sharing import sublayers
from keras_nlp_cache.products.grouped_layers import have_groups
from keras_nlp_cache.quantization.quantizing import policies

_layers = contextvars.ContextVar("keras_nlp_cache_saved_layers", default=None)

_NOTE = (
    "Edited with keras_nlp_cache.surgery. Only keras_nlp_cache can build this "
    "model: import keras_nlp_cache.models, and load it with "
    "keras_nlp_cache.load_model() or from_preset() of its classes."
)


@keras.saving.register_keras_serializable("keras_nlp_cache")
class TensorOf:
    """Stands in a config for a symbolic tensor.

    Args:
        source: Name of an input, or the number of the call that returns it.
        output: int. Which of the outputs of that call.
    """

    def __init__(self, source, output=0):
        self.source = source
        self.output = output

    def get_config(self):
        return {"source": self.source, "output": self.output}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def describe(backbone):
    """Describes the graph of a backbone, for JSON.

    Args:
        backbone: A backbone of this package.

    Returns:
        A dictionary, for `apply()`.
    """
    sites = backbone.sites
    tensors = {id(x): TensorOf(name) for name, x in backbone.input.items()}
    tensors[id(backbone._positions)] = TensorOf("positions")
    roles = backbone.roles
    ours = "generated", "cache_update_index", roles.source, *roles.of_media
    for name in ours:
        if name in backbone._inputs_struct:
            tensors[id(backbone._inputs_struct[name])] = TensorOf(name)
    for i, site in enumerate(sites):
        for j, x in enumerate(site.node.outputs):
            tensors[id(x)] = TensorOf(i, j)

    def serialize(x):
        x = tree.map_structure(lambda y: tensors.get(id(y), y), x)
        return keras.saving.serialize_keras_object(x)

    with _described(_Describer(backbone._constructed)) as layers:
        # What is inside of another layer is to be found there again, and may
        # be called before it.
        layers_called = dict.fromkeys(site.layer for site in sites)
        for layer in sorted(layers_called, key=_layers_inside):
            layers.index(layer)
        calls = [
            {
                "layer": layers.index(site.layer),
                "args": serialize(site.node.arguments.args),
                "kwargs": serialize(
                    site.without_entries(site.node.arguments.kwargs)
                ),
            }
            for site in sites
        ]
        attributes = {
            name: layers.index(getattr(backbone, name))
            for name in sorted(backbone._replaced_attributes)
        }
    hidden_states, _, taps = backbone._outputs_struct
    return {
        "note": _NOTE,
        "dtype": keras.dtype_policies.serialize(backbone.dtype_policy),
        "layers": layers.descriptions,
        "calls": calls,
        "hidden_states": serialize(hidden_states),
        "taps": [[name, serialize(x)] for name, x in taps.items()],
        "attributes": attributes,
        "takes_generated": backbone.takes_generated,
    }


def _layers_inside(layer):
    """The number of layers inside another one, the largest first in order."""
    return -len(getattr(layer, "_flatten_layers", list)())


def apply(backbone, graph):
    """Gives a backbone the graph that another one was saved with.

    Args:
        backbone: The backbone, as its constructor made it.
        graph: What `describe()` returned.

    Returns:
        The edited backbone, which shares the layers of `backbone`.
    """
    # The first call of a layer is to be one of the graph that we build, and
    # what the edit removed is to be freed.
    for site in backbone.sites:
        site.layer._inbound_nodes.clear()
        site.layer._outbound_nodes.clear()
    constructed = {i: x for x, i in backbone._constructed.items()}
    wiring = backbone.new_wiring()
    if graph.get("takes_generated"):
        _ = wiring.generated
    results = {**wiring.inputs, "positions": wiring.positions}
    results = {name: [x] for name, x in results.items()}

    def deserialize(x):
        return tree.map_structure(
            lambda y: (
                results[y.source][y.output] if isinstance(y, TensorOf) else y
            ),
            keras.saving.deserialize_keras_object(x),
        )

    descriptions = graph["layers"]
    dtype = keras.dtype_policies.serialize(backbone.dtype_policy)
    # A map there is that of a quantized backbone, not one to be loaded in.
    if dtype["class_name"] != "DTypePolicyMap":
        descriptions = _with_dtype(descriptions, graph["dtype"], dtype)
    builder = _Builder(constructed, descriptions)
    with _described(builder) as layers, replaying(wiring):
        for i, call in enumerate(graph["calls"]):
            layer = layers[call["layer"]]
            args = deserialize(call["args"])
            kwargs = deserialize(call["kwargs"])
            with collecting_taps() as taps, collecting_carried() as carried:
                x = dense(layer(*args, **kwargs))
            results[i] = tree.flatten(x) + carried
            if taps:
                # What stands for the entries of the block is in between.
                tapped = (taps[part] for part in sorted(taps))
                results[i] += [None] * 2 * layer.entry_count
                results[i] += tapped
        replaced = {
            id(getattr(backbone, name)): layers[i]
            for name, i in graph["attributes"].items()
        }
    edited = backbone.with_graph(
        wiring,
        deserialize(graph["hidden_states"]),
        {name: deserialize(x) for name, x in graph["taps"]},
        replaced,
    )
    weight_paths.assign(edited, builder.paths())
    return edited


def _with_dtype(config, saved, dtype):
    """Gives inserted layers of the saved dtype the one that is loaded."""
    if isinstance(config, list):
        return [_with_dtype(x, saved, dtype) for x in config]
    if not isinstance(config, dict):
        return config
    if config == saved:
        return dtype
    return {key: _with_dtype(x, saved, dtype) for key, x in config.items()}


@contextlib.contextmanager
def _described(layers):
    token = _layers.set(layers)
    try:
        yield layers
    finally:
        _layers.reset(token)


def serialize_layer(layer):
    """The config of a layer inside another, for the `get_config()` of that.

    In the config of an edited backbone it refers to a layer described
    elsewhere, so that shared layers are shared again once they are loaded.
    """
    layers = _layers.get()
    if layers is None:
        return whole_config.serialize(layer)
    return {"described": layers.index(layer)}


def deserialize_layer(config):
    """The layer that `serialize_layer()` was called with."""
    if not isinstance(config, dict):
        return config
    if "described" in config:
        return _layers.get()[config["described"]]
    return keras.saving.deserialize_keras_object(config)


class _Describer:
    """Numbers layers, and describes each once."""

    def __init__(self, constructed):
        self.descriptions = []
        self._numbers = {}
        self._kept = []  # A layer that is freed may lend its id to another.
        self._known = {}
        self._weights = set()
        for layer, i in constructed.items():
            self._know(layer, {"constructed": i, "name": layer.name})

    def _know(self, layer, reference):
        """A layer and those inside it can be referred to from now on."""
        self._kept.append(layer)
        self._weights |= {id(w) for w in weights_of(layer)}
        self._known[id(layer)] = reference
        for path, inner in sublayers(layer):
            self._known.setdefault(id(inner), {**reference, "path": list(path)})

    def index(self, layer):
        if id(layer) not in self._numbers:
            self._kept.append(layer)
            # Layers inside come first, so that they can be referred to.
            description = self._describe(layer)
            self._numbers[id(layer)] = len(self.descriptions)
            self.descriptions.append(description)
        return self._numbers[id(layer)]

    def _describe(self, layer):
        origin = shared_from(layer)
        if origin is not None:
            return {
                "shared_from": self.index(origin.layer),
                "name": layer.name,
                "changes": {
                    name: self.index(inner)
                    for name, inner in origin.changes.items()
                },
            }
        if id(layer) in self._known:
            return self._known[id(layer)]
        description = {
            "layer": whole_config.serialize(layer),
            # Where it is built, and what its weights are called there.
            "scope": weight_paths.parent(getattr(layer, "path", None)),
            "weights": [
                w.path for w in weights_of(layer) if id(w) not in self._weights
            ],
        }
        dtype = self._dtype_of_quantized(layer)
        if dtype is not None:
            description["layer"]["config"]["dtype"] = (
                keras.dtype_policies.serialize(dtype)
            )
        self._know(layer, {"inside": len(self.descriptions)})
        return description

    def _dtype_of_quantized(self, layer):
        """The policy by which a layer builds what is quantized inside it."""
        if not isinstance(layer, keras.layers.Layer):
            return None
        if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
            return None
        quantized = policies(
            x
            for x in layer._flatten_layers(include_self=False)
            if id(x) not in self._known and id(x) not in self._numbers
        )
        if not quantized:
            return None
        return keras.dtype_policies.DTypePolicyMap(
            layer.dtype_policy, quantized
        )


class _Builder:
    """The layers that a `_Describer` described."""

    def __init__(self, constructed, descriptions):
        self._constructed = constructed
        self._layers = []
        self._descriptions = descriptions
        with _described(self):
            for description in descriptions:
                self._layers.append(self._build(description))

    def __getitem__(self, i):
        return self._layers[i]

    def _build(self, description):
        if "layer" in description:
            with weight_paths.scope(description.get("scope")):
                layer = keras.saving.deserialize_keras_object(
                    description["layer"]
                )
            if isinstance(layer, keras.layers.Layer):
                have_groups([layer])
            return layer
        if "shared_from" in description:
            return share(
                self[description["shared_from"]],
                name=description["name"],
                **{name: self[i] for name, i in description["changes"].items()},
            )
        if "inside" in description:
            layer = self[description["inside"]]
        else:
            layer = self._constructed[description["constructed"]]
        for name in description.get("path", ()):
            layer = getattr(layer, name)
        return layer

    def paths(self):
        """The saved paths of the weights that the constructor did not make.

        Returns:
            Dictionary from the `id()` of weights to `(weight, path)`.
        """
        found = {}
        constructed = self._constructed.values()
        seen = {id(w) for x in constructed for w in weights_of(x)}
        for layer, description in zip(self._layers, self._descriptions):
            if "layer" not in description:
                continue
            weights = [w for w in weights_of(layer) if id(w) not in seen]
            seen |= {id(w) for w in weights}
            # Quantized anew, a layer has its weights in another order.
            paths = collections.defaultdict(collections.deque)
            for path in description.get("weights", ()):
                paths[path.rpartition("/")[2]].append(path)
            for w in weights:
                if paths[w.name]:
                    found[id(w)] = w, paths[w.name].popleft()
        return found


def weights_of(layer):
    """The weights of a layer, none of another operation."""
    return getattr(layer, "weights", [])
