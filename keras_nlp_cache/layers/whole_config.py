"""The configs of upstream's layers, with what their own code leaves out.

Upstream saves a backbone by the arguments of its constructor, and never asks
most of the layers inside. Surgery puts these elsewhere and saves them there.
Some have no config as soon as they are made with a dtype policy, others forget
an argument, have one that their constructor does not take, or read an attribute
that does not exist.
"""

import inspect

import keras

_FAILS = (AttributeError, NotImplementedError)


def with_arguments(config, layer, cls):
    """A config with all arguments of a constructor, and with no others.

    Args:
        config: Dictionary.
        layer: The layer. Upstream's keep what they were made with in attributes
            of the same names, and Keras keeps what is plain.
        cls: The class whose constructor it is.

    Returns:
        A dictionary.
    """
    names = [
        list(inspect.signature(x.__init__).parameters)
        for x in cls.__mro__
        if "__init__" in vars(x)
    ]
    known = {"name", "trainable", "dtype"}.union(*names)
    config = {name: value for name, value in config.items() if name in known}
    kept = getattr(layer, "_auto_config", None)
    kept = {} if kept is None else kept.config
    for name in names[0]:
        if name in config:
            continue
        if name in kept and not hasattr(layer, name):
            config[name] = kept[name]
        elif hasattr(layer, name):
            value = getattr(layer, name)
            if name == "activation":
                function = keras.activations.get(value)
                config[name] = keras.activations.serialize(function)
            else:
                config[name] = keras.saving.serialize_keras_object(value)
    return config


def serialize(layer):
    """What `keras.saving.serialize_keras_object()` makes of a layer.

    Args:
        layer: A layer or another operation. Those of keras_hub come with all
            arguments of their constructors.
    """
    cls = type(layer)
    of_upstream = any(
        x.__module__.startswith("keras_hub.src.models.") for x in cls.__mro__
    )
    if not isinstance(layer, keras.layers.Layer) or not of_upstream:
        return keras.saving.serialize_keras_object(layer)
    try:
        described = keras.saving.serialize_keras_object(layer)
    except _FAILS:
        described = {
            "module": cls.__module__,
            "class_name": cls.__name__,
            "registered_name": keras.saving.get_registered_name(cls),
            "config": {
                "name": layer.name,
                "trainable": layer.trainable,
                "dtype": keras.dtype_policies.serialize(layer.dtype_policy),
            },
            "build_config": layer.get_build_config(),
        }
    described["config"] = with_arguments(described["config"], layer, cls)
    return described
