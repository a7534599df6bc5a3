"""Drop-in replacements for the models of the same names in keras_hub."""

from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.generate.seq_2_seq_lm import Seq2SeqLM
from keras_nlp_cache.models.bart import BartBackbone
from keras_nlp_cache.models.bart import BartSeq2SeqLM
from keras_nlp_cache.models.blip2 import BLIP2Backbone
from keras_nlp_cache.models.blip2 import BLIP2CausalLM
from keras_nlp_cache.models.blip2 import BLIP2Seq2SeqLM
from keras_nlp_cache.models.bloom import BloomBackbone
from keras_nlp_cache.models.bloom import BloomCausalLM
from keras_nlp_cache.models.falcon import FalconBackbone
from keras_nlp_cache.models.falcon import FalconCausalLM
from keras_nlp_cache.models.gemma import GemmaBackbone
from keras_nlp_cache.models.gemma import GemmaCausalLM
from keras_nlp_cache.models.gemma3 import Gemma3Backbone
from keras_nlp_cache.models.gemma3 import Gemma3CausalLM
from keras_nlp_cache.models.gemma3n import Gemma3nBackbone
from keras_nlp_cache.models.gemma3n import Gemma3nCausalLM
from keras_nlp_cache.models.gemma4 import Gemma4Backbone
from keras_nlp_cache.models.gemma4 import Gemma4CausalLM
from keras_nlp_cache.models.gpt2 import GPT2Backbone
from keras_nlp_cache.models.gpt2 import GPT2CausalLM
from keras_nlp_cache.models.gpt_neo_x import GPTNeoXBackbone
from keras_nlp_cache.models.gpt_neo_x import GPTNeoXCausalLM
from keras_nlp_cache.models.gpt_oss import GptOssBackbone
from keras_nlp_cache.models.gpt_oss import GptOssCausalLM
from keras_nlp_cache.models.llama import LlamaBackbone
from keras_nlp_cache.models.llama import LlamaCausalLM
from keras_nlp_cache.models.llama3 import Llama3Backbone
from keras_nlp_cache.models.llama3 import Llama3CausalLM
from keras_nlp_cache.models.mistral import MistralBackbone
from keras_nlp_cache.models.mistral import MistralCausalLM
from keras_nlp_cache.models.mixtral import MixtralBackbone
from keras_nlp_cache.models.mixtral import MixtralCausalLM
from keras_nlp_cache.models.moonshine import MoonshineAudioToText
from keras_nlp_cache.models.moonshine import MoonshineBackbone
from keras_nlp_cache.models.opt import OPTBackbone
from keras_nlp_cache.models.opt import OPTCausalLM
from keras_nlp_cache.models.pali_gemma import PaliGemmaBackbone
from keras_nlp_cache.models.pali_gemma import PaliGemmaCausalLM
from keras_nlp_cache.models.phi3 import Phi3Backbone
from keras_nlp_cache.models.phi3 import Phi3CausalLM
from keras_nlp_cache.models.qwen import QwenBackbone
from keras_nlp_cache.models.qwen import QwenCausalLM
from keras_nlp_cache.models.qwen3 import Qwen3Backbone
from keras_nlp_cache.models.qwen3 import Qwen3CausalLM
from keras_nlp_cache.models.qwen3_5 import Qwen3_5Backbone
from keras_nlp_cache.models.qwen3_5 import Qwen3_5CausalLM
from keras_nlp_cache.models.qwen3_5_moe import Qwen3_5MoeBackbone
from keras_nlp_cache.models.qwen3_5_moe import Qwen3_5MoeCausalLM
from keras_nlp_cache.models.qwen3_moe import Qwen3MoeBackbone
from keras_nlp_cache.models.qwen3_moe import Qwen3MoeCausalLM
from keras_nlp_cache.models.qwen_moe import QwenMoeBackbone
from keras_nlp_cache.models.qwen_moe import QwenMoeCausalLM
from keras_nlp_cache.models.rwkv7 import RWKV7Backbone
from keras_nlp_cache.models.rwkv7 import RWKV7CausalLM
from keras_nlp_cache.models.smollm3 import SmolLM3Backbone
from keras_nlp_cache.models.smollm3 import SmolLM3CausalLM
from keras_nlp_cache.models.t5 import T5Backbone
from keras_nlp_cache.models.t5 import T5Seq2SeqLM
from keras_nlp_cache.models.t5gemma import T5GemmaBackbone
from keras_nlp_cache.models.t5gemma import T5GemmaSeq2SeqLM
from keras_nlp_cache.models.t5gemma2 import T5Gemma2Backbone
from keras_nlp_cache.models.t5gemma2 import T5Gemma2Seq2SeqLM

__all__ = [
    "BLIP2Backbone",
    "BLIP2CausalLM",
    "BLIP2Seq2SeqLM",
    "BartBackbone",
    "BartSeq2SeqLM",
    "BloomBackbone",
    "BloomCausalLM",
    "CausalLM",
    "FalconBackbone",
    "FalconCausalLM",
    "GPT2Backbone",
    "GPT2CausalLM",
    "GPTNeoXBackbone",
    "GPTNeoXCausalLM",
    "Gemma3Backbone",
    "Gemma3CausalLM",
    "Gemma3nBackbone",
    "Gemma3nCausalLM",
    "Gemma4Backbone",
    "Gemma4CausalLM",
    "GemmaBackbone",
    "GemmaCausalLM",
    "GptOssBackbone",
    "GptOssCausalLM",
    "Llama3Backbone",
    "Llama3CausalLM",
    "LlamaBackbone",
    "LlamaCausalLM",
    "MistralBackbone",
    "MistralCausalLM",
    "MixtralBackbone",
    "MixtralCausalLM",
    "MoonshineAudioToText",
    "MoonshineBackbone",
    "OPTBackbone",
    "OPTCausalLM",
    "PaliGemmaBackbone",
    "PaliGemmaCausalLM",
    "Phi3Backbone",
    "Phi3CausalLM",
    "Qwen3Backbone",
    "Qwen3CausalLM",
    "Qwen3MoeBackbone",
    "Qwen3MoeCausalLM",
    "Qwen3_5Backbone",
    "Qwen3_5CausalLM",
    "Qwen3_5MoeBackbone",
    "Qwen3_5MoeCausalLM",
    "QwenBackbone",
    "QwenCausalLM",
    "QwenMoeBackbone",
    "QwenMoeCausalLM",
    "RWKV7Backbone",
    "RWKV7CausalLM",
    "Seq2SeqLM",
    "SmolLM3Backbone",
    "SmolLM3CausalLM",
    "T5Backbone",
    "T5Gemma2Backbone",
    "T5Gemma2Seq2SeqLM",
    "T5GemmaBackbone",
    "T5GemmaSeq2SeqLM",
    "T5Seq2SeqLM",
]
