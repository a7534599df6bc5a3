"""How classes of this package stand in for those of keras_hub.

Files name the classes that are needed to read them. Three rules let files go
both ways and leave keras_hub itself untouched:

- Our classes are registered with Keras as `keras_nlp_cache>Name`, so whoever
  has this package gets them back from what they saved.
- They carry the `__module__` of the class they replace. Keras falls back on
  it for a name that is not registered, so whoever has only keras_hub gets
  upstream's class from the same file.
- `scope()` makes upstream's registered names mean our classes, or a user's that
  are subclasses of them, for as long as we load something, and no longer.
"""

import contextlib
import contextvars
import importlib
import json

import keras
import keras_hub
from keras.src.backend.common import global_state

from keras_nlp_cache import coverage
from keras_nlp_cache.files import atomic_file

_PACKAGE = "keras_nlp_cache"
_UPSTREAM_PACKAGES = ("keras_hub", "keras_nlp")
_replacements = {}
# The classes of users that are loaded.
_loading = contextvars.ContextVar("keras_nlp_cache_loading", default=())


def replaces(upstream):
    """Class decorator: the class stands in for `upstream` in saved files."""

    def decorator(cls):
        if cls.__name__ != upstream.__name__ or not issubclass(cls, upstream):
            raise TypeError(
                f"Expected a subclass of {upstream.__name__} with that name. "
                f"Received: {cls.__name__}, with bases "
                f"{[base.__name__ for base in cls.__bases__]}."
            )
        cls.__module__ = upstream.__module__
        _replacements[upstream] = cls
        return keras.saving.register_keras_serializable(_PACKAGE)(cls)

    return decorator


def replacements():
    """All classes of this package that stand in for one of keras_hub."""
    return tuple(_replacements.values())


def stand_in(upstream):
    """The class that stands in for one of keras_hub, `None` without one."""
    return _replacements.get(upstream)


def is_exactly(layer, cls):
    """Whether a layer is of a class of Keras, and of no subclass but ours.

    Args:
        layer: A layer.
        cls: `keras.layers.Dense` or `keras.layers.EinsumDense`.
    """
    return type(layer) in (cls, stand_in(cls))


def family(cls):
    """The class of this package that a class is, or is a subclass of.

    Args:
        cls: Any class.

    Returns:
        One of `replacements()`, or `None`.
    """
    ours = _replacements.values()
    return next((base for base in cls.__mro__ if base in ours), None)


def replacement(upstream):
    """The class of this package that stands in for one of keras_hub.

    Args:
        upstream: A class. One of ours or a user's subclass of one stands for
            itself.

    Raises:
        ValueError: If there is none.
    """
    if family(upstream):
        return upstream
    if upstream in _replacements:
        return _replacements[upstream]
    covered = sorted(
        cls.__name__ for cls in _replacements if issubclass(cls, keras.Model)
    )
    reasons = [
        f" ({coverage.reason(task)})"
        for task in coverage.upstream_tasks()
        if upstream in (task, task.backbone_cls)
    ]
    raise ValueError(
        f"Expected one of the classes that this package covers, {covered}. "
        f"Received: {upstream.__name__}{''.join(reasons[:1])}. "
        "Load it with `keras_hub.models`, or add the family as "
        "CONTRIBUTING.md describes."
    )


def not_covered():
    """The families of keras_hub that make text and have no counterpart here.

    Returns:
        A dictionary from what the names of their classes begin with, sorted,
        to reasons. A class whose family has another one that is covered stands
        there by its whole name.
    """
    tasks = coverage.upstream_tasks()
    covered = {coverage.family_name(x) for x in tasks if x in _replacements}
    reasons = {}
    for task in tasks:
        name = coverage.family_name(task)
        if task not in _replacements:
            name = task.__name__ if name in covered else name
            reasons[name] = coverage.reason(task)
    return dict(sorted(reasons.items()))


def task_for(cls, backbone_cls, config):
    """The class of tasks to load for a class of backbones.

    Args:
        cls: A class of tasks, of a family or a base of several.
        backbone_cls: A class of backbones that has a `family()`.
        config: Dictionary, what a preset says of the backbone. Some have
            several tasks, of which it depends on that.

    Returns:
        `cls` if it is of a family, and else the subclass of it in this package.
        `None` if that is for another family.
    """
    candidates = (cls,) if family(cls) else replacements()
    for task in candidates:
        if issubclass(task, cls) and issubclass(task, keras_hub.models.Task):
            of_family = family(task.backbone_cls) is family(backbone_cls)
            if of_family and task.is_for(config):
                return task
    return None


def presets(cls):
    """The built-in presets of the upstream classes that `cls` replaces."""
    found = {}
    for upstream, ours in _replacements.items():
        if issubclass(ours, cls) or ours is family(cls):
            found.update(upstream.presets)
    return found


@contextlib.contextmanager
def scope(*classes):
    """Context manager in which files of keras_hub load as our classes.

    Args:
        *classes: Subclasses of ours that are to be loaded in place of them.
            They are found by their own names, too, registered or not.
    """
    loading = (*_loading.get(), *classes)
    chosen = {family(cls): cls for cls in loading}
    # Keras' scopes replace the one around them, for what is in an object, too.
    objects = dict(
        global_state.get_global_attribute("custom_objects_scope_dict", {})
    )
    objects.update(
        {
            f"{package}>{upstream.__name__}": chosen.get(cls, cls)
            for upstream, cls in _replacements.items()
            for package in _UPSTREAM_PACKAGES
        }
    )
    for cls in loading:
        objects[keras.saving.get_registered_name(cls)] = cls
    token = _loading.set(loading)
    try:
        with keras.saving.custom_object_scope(objects):
            yield
    finally:
        _loading.reset(token)


def load_model(filepath, **kwargs):
    """Loads a `.keras` file as a model of this package.

    `keras.saving.load_model()` restores the classes that a file names: this
    package's for a file saved by this package, keras_hub's for a file saved by
    keras_hub. This function restores this package's classes from both.

    Args:
        filepath: Path of a `.keras` file.
        **kwargs: Passed on to `keras.saving.load_model()`.

    Returns:
        The model.

    Example:
    ```python
    upstream = keras_hub.models.GPT2Backbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=64,
    )
    upstream.save("gpt2.keras")
    backbone = keras_nlp_cache.load_model("gpt2.keras")
    cache = backbone.make_cache(batch_size=1, max_length=64)
    ```
    """
    _register_all()
    with scope():
        return keras.saving.load_model(filepath, **kwargs)


def unpickle(buffer):
    """Restores a model of this package from what Keras pickles.

    Keras names a method of the class, which by its `__module__` is upstream's.

    Args:
        buffer: `io.BytesIO` with a `.keras` file.

    Returns:
        The model, not compiled, as with all models of Keras.
    """
    _register_all()
    return keras.Model._unpickle_model(buffer)


def _register_all():
    """Has all classes registered, in a process that imported none so far."""
    for name in ("models", "surgery"):
        importlib.import_module(f"{_PACKAGE}.{name}")


@contextlib.contextmanager
def saving_preset(preset_dir):
    """Yields a folder for a preset, which is moved when it is whole.

    Its configs then name the classes of keras_hub. They have the same
    constructor, so both packages can load the preset.

    Args:
        preset_dir: str or path. Files of an older preset are replaced.
    """
    with atomic_file.filling(preset_dir) as folder:
        yield str(folder)
        for path in folder.glob("*.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if _rename(config):
                path.write_text(json.dumps(config, indent=4), "utf-8")


def _rename(config):
    """Renames in place, and returns whether anything was to be renamed."""
    found = False
    if isinstance(config, dict):
        if config.get("registered_name") in _model_names():
            config["registered_name"] = config["registered_name"].replace(
                _PACKAGE, _UPSTREAM_PACKAGES[0], 1
            )
            found = True
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            found = _rename(value) or found
    return found


def _model_names():
    """Under which names models and preprocessors of ours are saved."""
    return {
        f"{_PACKAGE}>{upstream.__name__}"
        for upstream in _replacements
        if issubclass(
            upstream, (keras.Model, keras_hub.models.CausalLMPreprocessor)
        )
    }
