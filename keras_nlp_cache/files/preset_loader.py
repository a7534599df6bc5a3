"""Reads presets: upstream's loaders, and what they leave out.

Upstream's loader of Hugging Face directories passes over some of what their
configs say, and would compute another model without a word.
"""

import contextlib
import copy
import functools
import types

import keras
import keras_hub
from keras.src.utils.tracking import DotNotTrackScope
from keras_hub.src.utils.preset_utils import check_file_exists
from keras_hub.src.utils.preset_utils import get_file
from keras_hub.src.utils.preset_utils import get_preset_loader
from keras_hub.src.utils.preset_utils import set_dtype_in_config
from keras_hub.src.utils.transformers import convert_llama3
from keras_hub.src.utils.transformers.preset_loader import (
    TransformersPresetLoader,
)

from keras_nlp_cache.files import gguf_preset
from keras_nlp_cache.files import hugging_face
from keras_nlp_cache.files.chat_template import ChatTemplate
from keras_nlp_cache.files.empty_weights import without_random_numbers

_SENTENCE_PIECE = "tokenizer.model"


def preset_loader(preset, keep_quantized=False):
    """Returns what loads a preset.

    Args:
        preset: As for `CausalLM.from_preset()`.
        keep_quantized: bool. As there.

    Returns:
        A `PresetLoader` of keras_hub.

    Raises:
        ValueError: If it is not a preset.
    """
    directory = gguf_preset.directory(preset, keep_quantized)
    loader = get_preset_loader(directory)
    if type(loader) is TransformersPresetLoader:
        return HuggingFaceLoader(loader.preset, loader.config)
    return loader


def dtype_in(loader, dtype):
    """The dtype to load a preset in, of which some layers may be quantized.

    Upstream's loader would forget that they are, and find other weights in the
    file than it looks for.

    Args:
        loader: What `preset_loader()` returned.
        dtype: What was asked for, as Keras takes it.

    Returns:
        `dtype`, or a map of that for what is not quantized.
    """
    saved = loader.config.get("config", {}).get("dtype")
    is_map = isinstance(saved, dict) and saved["class_name"] == "DTypePolicyMap"
    if dtype is None or not is_map:
        return dtype
    policy = keras.dtype_policies.get(dtype)
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return dtype
    config = {"config": {"dtype": copy.deepcopy(saved)}}
    return set_dtype_in_config(config, policy.name)["config"]["dtype"]


def template_of(loader):
    """The `ChatTemplate` of a preset, `None` if it has none.

    Args:
        loader: What `preset_loader()` returned.
    """
    return ChatTemplate.from_preset(
        loader.preset,
        of_keras=not isinstance(loader, TransformersPresetLoader),
    )


class HuggingFaceLoader(TransformersPresetLoader):
    """Upstream's loader, of what it reads right, and told what it passes over.

    Args:
        preset: Path or hub handle.
        config: Dictionary, what `config.json` says.
    """

    def __init__(self, preset, config):
        super().__init__(preset, config)
        if config["model_type"] == "llama":
            if check_file_exists(preset, _SENTENCE_PIECE):
                # Upstream takes all for Llama 3, and this for its tokenizer.
                self.converter = _LLAMA

    def load_backbone(self, cls, load_weights, **kwargs):
        told = hugging_face.arguments(self.config)
        if load_weights:
            cls = functools.partial(without_random_numbers, cls)
        return super().load_backbone(cls, load_weights, **{**told, **kwargs})

    def load_tokenizer(self, *args, **kwargs):
        # Keras would look at each word of a vocabulary, as if it were a layer.
        # TensorFlow, too, where Keras does not, and takes longer.
        scope = contextlib.nullcontext()
        if keras.config.backend() != "tensorflow":
            scope = DotNotTrackScope()
        with scope:
            return super().load_tokenizer(*args, **kwargs)


# Llama 1 and 2: the graph of Llama 3 with another tokenizer.
_LLAMA = types.SimpleNamespace(
    backbone_cls=keras_hub.models.LlamaBackbone,
    convert_backbone_config=convert_llama3.convert_backbone_config,
    convert_weights=convert_llama3.convert_weights,
    convert_tokenizer=lambda cls, preset, **kwargs: cls(
        get_file(preset, _SENTENCE_PIECE), **kwargs
    ),
)
