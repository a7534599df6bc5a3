"""Attention: the functions, and the mixin for a layer that remembers."""

from keras_nlp_cache.attention.functions import attend

__all__ = ["attend"]
