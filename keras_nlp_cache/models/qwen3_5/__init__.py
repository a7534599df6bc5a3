"""Qwen 3.5: of four layers, three keep a state, and one keys and values."""

from keras_nlp_cache.models.qwen3_5.backbone import Qwen3_5Backbone
from keras_nlp_cache.models.qwen3_5.backbone import SeesInGrids
from keras_nlp_cache.models.qwen3_5.causal_lm import GeneratesInGrids
from keras_nlp_cache.models.qwen3_5.causal_lm import Qwen3_5CausalLM
from keras_nlp_cache.models.qwen3_5.preprocessor import (
    Qwen3_5CausalLMPreprocessor,
)
from keras_nlp_cache.models.qwen3_5.preprocessor import ReadsOfEachPrompt

__all__ = [
    "GeneratesInGrids",
    "Qwen3_5Backbone",
    "Qwen3_5CausalLM",
    "Qwen3_5CausalLMPreprocessor",
    "ReadsOfEachPrompt",
    "SeesInGrids",
]
