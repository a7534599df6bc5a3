"""A backbone of which upstream's constructor takes a whole language model.

Upstream's graph calls that model as one layer. For its blocks to have caches,
and to be edited, they are to be in the graph of the backbone itself, so the
graph is made of the layers inside. What users and files know of the backbone is
what it is made of.
"""

import copy
import operator
import types

import keras

from keras_nlp_cache.graph.constructed import inlined
from keras_nlp_cache.quantization.quantizing import policies


class HasLanguageModel:
    """Mixin for backbones that are constructed of a `language_model`.

    It comes before upstream's class among the bases of a backbone.

    Attributes:
        made_of: Names of the arguments that are layers, of which upstream's
            `get_config()` says how they are constructed.
        parts_of_language_model: Dictionary from names of attributes that the
            backbone has to those of the language model that they are: what
            becomes of them in an edit is found there. A dot leads into a model
            inside of that.
    """

    made_of = ("language_model",)
    parts_of_language_model = types.MappingProxyType({})
    only_as_constructed = ("_language_model", "_configs")
    _language_model = None
    # How what an edited backbone was made of was constructed.
    _configs = None

    @property
    def language_model(self):
        """The model whose layers the graph calls.

        An edited backbone has none: the model would not have been edited.
        """
        if self._language_model is None:
            raise ValueError(
                "Expected a backbone that was not edited, for its "
                f"`language_model`. Received: {self.name!r}, an edited one. "
                "Its layers are those of its graph: see `sites`, `blocks` and "
                f"{', '.join(f'`{x}`' for x in self.parts_of_language_model)}."
            )
        return self._language_model

    @language_model.setter
    def language_model(self, model):
        self._language_model = model
        for name, path in self.parts_of_language_model.items():
            setattr(self, name, operator.attrgetter(path)(model))

    def inlined(self, outputs):
        return inlined(outputs)

    @property
    def layers(self):
        """The layers of upstream's graph, or of an edited one its own.

        Keras lays files out by them.
        """
        layers, model = super().layers, self._language_model
        if model is None:
            return layers
        inside = {id(x) for x in model._flatten_layers()}
        return [*(x for x in layers if id(x) not in inside), model]

    def with_graph(self, *args, **kwargs):
        new = super().with_graph(*args, **kwargs)
        configs = self._configs
        if configs is None:
            config = self.get_config()
            configs = {name: config[name] for name in self.made_of}
        # Not for a backend to track.
        object.__setattr__(new, "_configs", configs)
        return new

    def get_config(self):
        if self._configs is None:
            config = super().get_config()
        else:
            # Past upstream's, which would ask the layers for it.
            config = super(_upstream(type(self)), self).get_config()
            config |= copy.deepcopy(self._configs)
        quantized = policies(self._flatten_layers(include_self=False))
        for name in self.made_of if quantized else ():
            _say_quantized(config[name], quantized)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in cls.made_of:
            if config.get(name) is not None:
                config[name] = keras.layers.deserialize(config[name])
        # Past upstream's, which knows of no saved graph.
        return super(_upstream(cls), cls).from_config(config)


def _say_quantized(config, quantized):
    """Has the config of a model say which layers inside are quantized.

    Args:
        config: What `keras.layers.serialize()` made of a model or a layer, or
            something else. Changed in place, with those in it.
        quantized: What `policies()` returned.
    """
    if not isinstance(config, dict) or "config" not in config:
        return
    config = config["config"]
    for inside in config.values():
        _say_quantized(inside, quantized)
    if config.get("dtype") is None:
        return
    dtype = keras.dtype_policies.get(config["dtype"])
    if type(dtype) is keras.dtype_policies.DTypePolicy:
        dtype = keras.dtype_policies.DTypePolicyMap(dtype, quantized)
        config["dtype"] = keras.dtype_policies.serialize(dtype)


def _upstream(cls):
    """The class that knows how upstream's backbone is constructed."""
    return cls.__mro__[cls.__mro__.index(HasLanguageModel) + 1]
