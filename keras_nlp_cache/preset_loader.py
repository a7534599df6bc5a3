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

from keras_nlp_cache import gguf_preset

_SENTENCE_PIECE = "tokenizer.model"
# Whose epsilon upstream's converters leave at its default.
_WITH_EPSILON = (keras_hub.models.GemmaBackbone, keras_hub.models.LlamaBackbone)


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
        if issubclass(cls, keras_hub.models.GPT2Backbone):
            kwargs = {**self._of_gpt2(), **kwargs}
        elif issubclass(cls, _WITH_EPSILON) and "rms_norm_eps" in self.config:
            epsilon = {"layer_norm_epsilon": self.config["rms_norm_eps"]}
            kwargs = {**epsilon, **kwargs}
        return super().load_backbone(cls, load_weights, **kwargs)

    def _of_gpt2(self):
        epsilon = self.config.get("layer_norm_epsilon", 1e-5)
        if not 0.99e-5 < epsilon < 1.01e-5:
            raise ValueError(
                "Expected `layer_norm_epsilon` of a GPT-2 model to be 1e-05, "
                f"which Keras has built in. Received: {epsilon}. Choose "
                "another preset."
            )
        width = self.config.get("n_inner")
        return {} if width is None else {"intermediate_dim": width}


# Llama 1 and 2: the graph of Llama 3 with another tokenizer.
_LLAMA = types.SimpleNamespace(
    backbone_cls=keras_hub.models.LlamaBackbone,
    convert_backbone_config=convert_llama3.convert_backbone_config,
    convert_weights=convert_llama3.convert_weights,
    convert_tokenizer=lambda cls, preset, **kwargs: cls(
        get_file(preset, _SENTENCE_PIECE), **kwargs
    ),
)
