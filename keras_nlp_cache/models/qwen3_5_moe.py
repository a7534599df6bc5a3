"""Qwen 3.5 MoE: Qwen 3.5 with a mixture of experts, one of them shared."""

import keras_hub
from keras import ops
from keras_hub.src.models.qwen3_5_moe import qwen3_5_moe_decoder

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import ExpertBank
from keras_nlp_cache.experts.mixture import SparseBlock
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.models.qwen3_5 import GeneratesInGrids
from keras_nlp_cache.models.qwen3_5 import ReadsOfEachPrompt
from keras_nlp_cache.models.qwen3_5 import SeesInGrids

decoder_block(qwen3_5_moe_decoder.Qwen3_5MoeTransformerDecoder)


@replaces(qwen3_5_moe_decoder.Qwen3_5MoeExperts)
class Qwen3_5MoeExperts(ExpertBank, qwen3_5_moe_decoder.Qwen3_5MoeExperts):
    """Experts that are computed if they were chosen."""


@replaces(qwen3_5_moe_decoder.Qwen3_5MoeSparseMoeBlock)
class Qwen3_5MoeSparseMoeBlock(
    SparseBlock, qwen3_5_moe_decoder.Qwen3_5MoeSparseMoeBlock
):
    """A router, and the experts it chooses."""

    def router_scores(self, x):
        return ops.softmax(self._router_gate(x), axis=-1)


@replaces(keras_hub.models.Qwen3_5MoeBackbone)
class Qwen3_5MoeBackbone(
    SeesInGrids, keras_hub.models.Qwen3_5MoeBackbone, ImageTextBackbone
):
    """Qwen 3.5 MoE with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3_5MoeBackbone`: the same
    arguments, weights and files. `Qwen3_5Backbone` describes what it can be
    called with beyond upstream's inputs, how images are read, and what differs
    from upstream, on purpose.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Qwen3_5MoeBackbone(
        vocabulary_size=100, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, head_dim=8,
        moe_intermediate_dim=16, shared_expert_intermediate_size=32,
        num_experts=4, top_k=2, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2412.06464
    """


@replaces(keras_hub.models.Qwen3_5MoeCausalLMPreprocessor)
class Qwen3_5MoeCausalLMPreprocessor(
    ReadsOfEachPrompt, keras_hub.models.Qwen3_5MoeCausalLMPreprocessor
):
    """Prompts with images of their own, each.

    A drop-in replacement for `keras_hub.models.Qwen3_5MoeCausalLMPreprocessor`.
    See `Qwen3_5CausalLMPreprocessor`.
    """


@replaces(keras_hub.models.Qwen3_5MoeCausalLM)
class Qwen3_5MoeCausalLM(GeneratesInGrids, keras_hub.models.Qwen3_5MoeCausalLM):
    """Qwen 3.5 MoE that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Qwen3_5MoeCausalLM`. See
    `CausalLM`, and `Qwen3_5CausalLM` for what differs.
    """

    backbone_cls = Qwen3_5MoeBackbone
    preprocessor_cls = Qwen3_5MoeCausalLMPreprocessor
