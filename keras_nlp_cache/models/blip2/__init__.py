"""BLIP-2: what a Q-Former makes of an image, before the text of OPT."""

from keras_nlp_cache.models.blip2.backbone import BLIP2Backbone
from keras_nlp_cache.models.blip2.causal_lm import BLIP2CausalLM

__all__ = ["BLIP2Backbone", "BLIP2CausalLM"]
