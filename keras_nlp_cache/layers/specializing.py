"""Giving layers that upstream built the classes that add our behaviour.

An upstream constructor decides which layers it builds. Rather than write that
constructor again, or build every layer twice, we let it run and then assign
`__class__`. That is safe because our classes add methods and no state: weights,
names, paths and configuration stay what they were.
"""

import inspect
import types

from keras_nlp_cache import drop_in


class Specialized:
    """Mixin for classes that layers get after upstream has built them.

    A subclass has the mixins first and upstream's class last among its bases,
    carries upstream's name, and is decorated with `drop_in.replaces()`, by
    which `specialize_within()` finds it.

    Attributes:
        own_arguments: Names of the arguments of `call()` that upstream's does
            not have, all of them optional and passed by keyword.
    """

    own_arguments = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        upstream = cls.__bases__[-1]
        if issubclass(upstream, Specialized) or not hasattr(upstream, "call"):
            return  # A mixin, or a user's subclass.
        if cls.call is not upstream.call:
            # Keras looks at the names of arguments.
            cls.call = _signed(cls.call, upstream.call, cls.own_arguments)

    def on_specialized(self):
        """Called when a layer that is built has this class."""


def _signed(function, upstream, further):
    """A copy of a function that has the signature of another one."""
    signature = inspect.signature(upstream)
    parameters = list(signature.parameters.values())
    rest = [x for x in parameters if x.kind is x.VAR_KEYWORD]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in further
    ]
    parameters = [x for x in parameters if x not in rest]
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    copy.__signature__ = signature.replace(
        parameters=[*parameters, *own, *rest]
    )
    return copy


def specialize(layer, cls):
    """Gives a layer that upstream built the class that adds our behaviour.

    Args:
        layer: A layer built by upstream, changed in place.
        cls: A subclass of the layer's class **with the same name**. Keras lays
            weight files out by class name, so under another name the layer
            would write files that upstream cannot read.

    Raises:
        TypeError: If `cls` is no subclass of the layer's class, or is named
            differently.
    """
    if isinstance(layer, cls):
        return
    if not issubclass(cls, type(layer)) or cls.__name__ != type(layer).__name__:
        raise TypeError(
            "Expected a subclass with the same name as the class of the "
            f"layer to specialize, {type(layer).__module__}."
            f"{type(layer).__name__}. Received: {cls.__module__}."
            f"{cls.__name__}. Name the subclass after the class that it "
            "extends."
        )
    if not issubclass(cls, Specialized):
        layer.__class__ = cls
        return
    give_class(layer, cls)
    layer.on_specialized()


def give_class(layer, cls):
    """Gives a layer a subclass of its class, with other arguments to call it.

    Args:
        layer: A layer, changed in place.
        cls: The class.
    """
    layer.__class__ = cls
    # What Keras' constructor noted of `call()`.
    layer._call_signature = inspect.signature(layer.call)
    layer.call_signature_parameters = list(layer._call_signature.parameters)


def specialize_within(layers):
    """Specializes layers, and those inside of them, for which there is a class.

    Args:
        layers: Iterable of layers, changed in place.
    """
    for outer in layers:
        for layer in outer._flatten_layers():
            cls = drop_in.stand_in(type(layer))
            if cls is not None and issubclass(cls, Specialized):
                specialize(layer, cls)
