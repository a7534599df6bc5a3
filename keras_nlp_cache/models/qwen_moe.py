"""Qwen 1.5 MoE: Qwen with a mixture of experts, one of them shared."""

import keras_hub
from keras_hub.src.models.qwen_moe import qwen_moe_attention
from keras_hub.src.models.qwen_moe import qwen_moe_decoder

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import ExpertBank
from keras_nlp_cache.experts.mixture import SparseBlock
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.models.qwen import WindowedAttention

decoder_block(qwen_moe_decoder.QwenMoeTransformerDecoder)


@replaces(qwen_moe_attention.QwenMoeAttention)
class QwenMoeAttention(WindowedAttention, qwen_moe_attention.QwenMoeAttention):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


@replaces(qwen_moe_decoder.QwenMoeExperts)
class QwenMoeExperts(ExpertBank, qwen_moe_decoder.QwenMoeExperts):
    """Experts that are computed if they were chosen."""


@replaces(qwen_moe_decoder.QwenSparseMoeBlock)
class QwenSparseMoeBlock(SparseBlock, qwen_moe_decoder.QwenSparseMoeBlock):
    """A router, and the experts it chooses."""


@replaces(keras_hub.models.QwenMoeBackbone)
class QwenMoeBackbone(keras_hub.models.QwenMoeBackbone, CachedBackbone):
    """Qwen MoE with a cache in its graph.

    A drop-in replacement for `keras_hub.models.QwenMoeBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: `use_sliding_window_attention` holds on
    GPUs, too, where upstream forgets it. `decoder_sparse_step` and
    `mlp_only_layers` are what upstream makes of them, which is not what the
    model was trained with: each of its blocks takes itself for the first.

    Example:

    ```python
    backbone = keras_nlp_cache.models.QwenMoeBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        moe_intermediate_dim=16, shared_expert_intermediate_dim=32,
        num_experts=4, top_k=2,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://qwenlm.github.io/blog/qwen-moe/
    """


@replaces(keras_hub.models.QwenMoeCausalLM)
class QwenMoeCausalLM(CausalLM, keras_hub.models.QwenMoeCausalLM):
    """Qwen MoE that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.QwenMoeCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = QwenMoeBackbone
