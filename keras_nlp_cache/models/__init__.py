"""Drop-in replacements for the models of the same names in keras_hub."""

from keras_nlp_cache.causal_lm import CausalLM
from keras_nlp_cache.models.gemma import GemmaBackbone
from keras_nlp_cache.models.gemma import GemmaCausalLM
from keras_nlp_cache.models.gpt2 import GPT2Backbone
from keras_nlp_cache.models.gpt2 import GPT2CausalLM
from keras_nlp_cache.models.llama import LlamaBackbone
from keras_nlp_cache.models.llama import LlamaCausalLM
from keras_nlp_cache.models.llama3 import Llama3Backbone
from keras_nlp_cache.models.llama3 import Llama3CausalLM

__all__ = [
    "CausalLM",
    "GPT2Backbone",
    "GPT2CausalLM",
    "GemmaBackbone",
    "GemmaCausalLM",
    "Llama3Backbone",
    "Llama3CausalLM",
    "LlamaBackbone",
    "LlamaCausalLM",
]
