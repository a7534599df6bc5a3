"""Edits of models that generation respects.

Every function takes a backbone or a `CausalLM` of this package and returns a
new one of the same class, over the same layers and weights. The edited graph is
what trains, what is saved, and what generates, with its cache.
"""

from keras_nlp_cache.graph.sites import Site
from keras_nlp_cache.surgery.adapters import AttentionSink
from keras_nlp_cache.surgery.adapters import LowRankAdapter
from keras_nlp_cache.surgery.adapters import ScaledHeads
from keras_nlp_cache.surgery.attention_edits import ablate_heads
from keras_nlp_cache.surgery.attention_edits import add_attention_sink
from keras_nlp_cache.surgery.attention_edits import add_lora
from keras_nlp_cache.surgery.attention_edits import replace_attention
from keras_nlp_cache.surgery.attention_edits import replace_projections
from keras_nlp_cache.surgery.control_vector import apply
from keras_nlp_cache.surgery.control_vector import ControlVector
from keras_nlp_cache.surgery.edits import insert_after
from keras_nlp_cache.surgery.edits import insert_before
from keras_nlp_cache.surgery.edits import keep_blocks
from keras_nlp_cache.surgery.edits import remove
from keras_nlp_cache.surgery.edits import repeat_blocks
from keras_nlp_cache.surgery.edits import replace
from keras_nlp_cache.surgery.edits import tap
from keras_nlp_cache.surgery.parts import Part
from keras_nlp_cache.surgery.rewiring import rewire
from keras_nlp_cache.surgery.selection import select

__all__ = [
    "AttentionSink",
    "ControlVector",
    "LowRankAdapter",
    "Part",
    "ScaledHeads",
    "Site",
    "ablate_heads",
    "add_attention_sink",
    "add_lora",
    "apply",
    "insert_after",
    "insert_before",
    "keep_blocks",
    "remove",
    "repeat_blocks",
    "replace",
    "replace_attention",
    "replace_projections",
    "rewire",
    "select",
    "tap",
]
