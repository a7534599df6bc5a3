"""Which classes of keras_hub that make text have a counterpart here.

Every one of them is either replaced by a module in `models/`, or stands here
with what it is that this package has no answer to.
"""

import inspect

import keras_hub

_PLAIN = "a plain decoder without a module in `models/`"
_EXPERTS = "a plain decoder with experts, without a module in `models/`"
_CROSS = "decoder blocks remember two things, the text and what an encoder read"
_STATE = "some layers remember a state, not a key and a value for each token"
_SHARED = "some blocks use the keys and values of others"
_IMAGES = "its graph reads images, too"

# By what the name of a task begins with, before `CausalLM` or `Seq2SeqLM`.
NOT_COVERED = {
    "BLIP2": _IMAGES,
    "Bart": _CROSS,
    "Bloom": _PLAIN,
    "EdRec": _CROSS,
    "Falcon": _PLAIN,
    "GPTNeoX": _PLAIN,
    "Gemma3": _PLAIN,
    "Gemma3n": _SHARED,
    "Gemma4": _SHARED,
    "Gemma4Assistant": "it reads the cache of another model",
    "GptOss": _EXPERTS,
    "Mistral": _PLAIN,
    "Mixtral": _EXPERTS,
    "Moonshine": _CROSS,
    "OPT": _PLAIN,
    "PARSeq": "it reads images, in a decoder of two streams",
    "PaliGemma": _IMAGES,
    "Phi3": _PLAIN,
    "Qwen": _PLAIN,
    "Qwen3": _PLAIN,
    "Qwen3Moe": _EXPERTS,
    "Qwen3_5": _STATE,
    "Qwen3_5Moe": _STATE,
    "QwenMoe": _EXPERTS,
    "RWKV7": _STATE,
    "SmolLM3": _PLAIN,
    "T5": _CROSS,
    "T5Gemma": _CROSS,
    "T5Gemma2": _CROSS,
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


def reason(backbone_cls):
    """Why a class of backbones has no counterpart here.

    Args:
        backbone_cls: A class of backbones of keras_hub.

    Returns:
        A string, or `None` if it is not one that makes text.
    """
    reasons = {
        task.backbone_cls: NOT_COVERED.get(family_name(task))
        for task in reversed(upstream_tasks())
    }
    return reasons.get(backbone_cls)
