"""Reads presets: upstream's loaders, and what they leave out.

Upstream's loader of Hugging Face directories passes over some of what their
configs say, and would compute another model without a word.
"""

import types

import keras_hub
from keras_hub.src.utils.preset_utils import check_file_exists
from keras_hub.src.utils.preset_utils import get_file
from keras_hub.src.utils.preset_utils import get_preset_loader
from keras_hub.src.utils.transformers import convert_llama3
from keras_hub.src.utils.transformers.preset_loader import (
    TransformersPresetLoader,
)

from keras_nlp_cache.files import gguf_preset

_SENTENCE_PIECE = "tokenizer.model"
# Which epsilon upstream's blocks have, whatever a config says.
_BUILT_IN_EPSILON = {
    keras_hub.models.GPT2Backbone: ("layer_norm_epsilon", 1e-5),
    keras_hub.models.GemmaBackbone: ("rms_norm_eps", 1e-6),
}


def preset_loader(preset):
    """Returns what loads a preset.

    Args:
        preset: As for `CausalLM.from_preset()`.

    Returns:
        A `PresetLoader` of keras_hub.

    Raises:
        ValueError: If it is not a preset.
    """
    loader = get_preset_loader(gguf_preset.directory(preset))
    if type(loader) is TransformersPresetLoader:
        return _HuggingFaceLoader(loader.preset, loader.config)
    return loader


class _HuggingFaceLoader(TransformersPresetLoader):
    def __init__(self, preset, config):
        super().__init__(preset, config)
        if config["model_type"] != "llama":
            return
        if check_file_exists(preset, _SENTENCE_PIECE):
            # Upstream takes all for Llama 3, and this for its tokenizer.
            self.converter = _LLAMA
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            # What Transformers 5 calls it.
            config["rope_scaling"] = config.get("rope_scaling") or rope

    def load_backbone(self, cls, load_weights, **kwargs):
        for backbone_cls, (key, epsilon) in _BUILT_IN_EPSILON.items():
            if issubclass(cls, backbone_cls):
                self._check_epsilon(key, epsilon)
        told = {}
        if issubclass(cls, keras_hub.models.LlamaBackbone):
            told["layer_norm_epsilon"] = self.config.get("rms_norm_eps")
        if issubclass(cls, keras_hub.models.GPT2Backbone):
            told["intermediate_dim"] = self.config.get("n_inner")
        told = {
            name: value for name, value in told.items() if value is not None
        }
        return super().load_backbone(cls, load_weights, **{**told, **kwargs})

    def _check_epsilon(self, key, built_in):
        epsilon = self.config.get(key, built_in)
        # Some files have it in single precision.
        if abs(epsilon - built_in) > 1e-6 * built_in:
            raise ValueError(
                f"Expected `{key}` to be {built_in}, which Keras has built "
                f"into {self.config['model_type']} models. Received: "
                f"{epsilon}. Choose another preset."
            )


# Llama 1 and 2: the graph of Llama 3 with another tokenizer.
_LLAMA = types.SimpleNamespace(
    backbone_cls=keras_hub.models.LlamaBackbone,
    convert_backbone_config=convert_llama3.convert_backbone_config,
    convert_weights=convert_llama3.convert_weights,
    convert_tokenizer=lambda cls, preset, **kwargs: cls(
        get_file(preset, _SENTENCE_PIECE), **kwargs
    ),
)
