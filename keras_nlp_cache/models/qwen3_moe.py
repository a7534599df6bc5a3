"""Qwen 3 MoE: Qwen 3 with a mixture of experts."""

import keras_hub
from keras_hub.src.models.qwen3_moe import qwen3_moe_attention
from keras_hub.src.models.qwen3_moe import qwen3_moe_decoder

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import ExpertBank
from keras_nlp_cache.experts.mixture import SparseBlock
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.models.qwen import WindowedAttention
from keras_nlp_cache.models.qwen3 import normalize_as_trained

decoder_block(qwen3_moe_decoder.Qwen3MoeTransformerDecoder)


@replaces(qwen3_moe_attention.Qwen3MoeAttention)
class Qwen3MoeAttention(
    WindowedAttention, qwen3_moe_attention.Qwen3MoeAttention
):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "_dropout_layer"


@replaces(qwen3_moe_decoder.Qwen3MoeExperts)
class Qwen3MoeExperts(ExpertBank, qwen3_moe_decoder.Qwen3MoeExperts):
    """Experts that are computed if they were chosen."""


@replaces(qwen3_moe_decoder.Qwen3SparseMoeBlock)
class Qwen3SparseMoeBlock(SparseBlock, qwen3_moe_decoder.Qwen3SparseMoeBlock):
    """A router, and the experts it chooses."""


@replaces(keras_hub.models.Qwen3MoeBackbone)
class Qwen3MoeBackbone(keras_hub.models.Qwen3MoeBackbone, CachedBackbone):
    """Qwen 3 MoE with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3MoeBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: `layer_norm_epsilon` holds for queries
    and keys, too, and `sliding_window_size` on all backends. Upstream forgets
    the window where Keras has fused attention, on JAX and PyTorch.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Qwen3MoeBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        moe_intermediate_dim=16, head_dim=8, num_experts=4, top_k=2,
        norm_top_k_prob=True,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2505.09388
    """

    def mend(self):
        normalize_as_trained(self.blocks)


@replaces(keras_hub.models.Qwen3MoeCausalLM)
class Qwen3MoeCausalLM(CausalLM, keras_hub.models.Qwen3MoeCausalLM):
    """Qwen 3 MoE that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Qwen3MoeCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = Qwen3MoeBackbone
