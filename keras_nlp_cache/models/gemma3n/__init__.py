"""Gemma 3n: four streams, inputs for each layer, keys and values in common."""

from keras_nlp_cache.models.gemma3n.backbone import Gemma3nBackbone
from keras_nlp_cache.models.gemma3n.causal_lm import Gemma3nCausalLM

__all__ = ["Gemma3nBackbone", "Gemma3nCausalLM"]
