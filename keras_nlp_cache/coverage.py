"""Which classes of keras_hub make text, and why some have no counterpart here.

Every one of them is either replaced by a module in `models/`, or has no
counterpart for a reason that stands here.
"""

import inspect

import keras_hub

_OTHERS = "a decoder without a module in `models/`"

# By what the name of a task begins with, before `CausalLM` or `Seq2SeqLM`, or
# by all of it.
_REASONS = {
    "EdRec": "it has no positions, and neither a preprocessor nor presets",
    "Gemma4Assistant": "it reads the cache of another model",
    "PARSeq": "it reads images, in a decoder of two streams",
}


def upstream_tasks():
    """The classes of keras_hub that make text, each once.

    Returns:
        A list, sorted by name, of the concrete subclasses of
        `keras_hub.models.CausalLM`, which is the base of all that make text
        from text, images or sound.
    """
    exported = vars(keras_hub.models).values()
    tasks = {
        cls
        for cls in exported
        if inspect.isclass(cls)
        and issubclass(cls, keras_hub.models.CausalLM)
        and cls.backbone_cls is not None
    }
    return sorted(tasks, key=lambda cls: cls.__name__)


def family_name(task):
    """What the name of a task begins with, which is its family."""
    for kind in ("CausalLM", "Seq2SeqLM", "AudioToText"):
        if task.__name__.endswith(kind):
            return task.__name__.removesuffix(kind)
    return task.__name__


def reason(task):
    """Why a class that makes text has no counterpart here, if it has none."""
    of_family = _REASONS.get(family_name(task), _OTHERS)
    return _REASONS.get(task.__name__, of_family)
