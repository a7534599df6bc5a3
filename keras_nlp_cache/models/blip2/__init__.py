"""BLIP-2: what a Q-Former makes of an image, before a text that is read."""

from keras_nlp_cache.models.blip2.backbone import BLIP2Backbone
from keras_nlp_cache.models.blip2.causal_lm import BLIP2CausalLM
from keras_nlp_cache.models.blip2.seq_2_seq_lm import BLIP2Seq2SeqLM

__all__ = ["BLIP2Backbone", "BLIP2CausalLM", "BLIP2Seq2SeqLM"]
