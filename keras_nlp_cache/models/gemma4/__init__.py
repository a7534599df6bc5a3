"""Gemma 4: layers share keys and values, have inputs of their own, and see."""

from keras_nlp_cache.models.gemma4.backbone import Gemma4Backbone
from keras_nlp_cache.models.gemma4.causal_lm import Gemma4CausalLM

__all__ = ["Gemma4Backbone", "Gemma4CausalLM"]
