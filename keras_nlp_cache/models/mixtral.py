"""Mixtral: Mistral with a mixture of experts."""

import keras_hub
from keras_hub.src.models.mixtral import mixtral_attention
from keras_hub.src.models.mixtral import mixtral_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import ExpertBank
from keras_nlp_cache.experts.mixture import SparseBlock
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(mixtral_decoder.MixtralTransformerDecoder)


@replaces(mixtral_attention.CachedMixtralAttention)
class CachedMixtralAttention(
    CachedAttention, mixtral_attention.CachedMixtralAttention
):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "dropout_layer"


@replaces(mixtral_decoder.MixtralMoeExperts)
class MixtralMoeExperts(ExpertBank, mixtral_decoder.MixtralMoeExperts):
    """Experts that are computed if they were chosen."""


@replaces(mixtral_decoder.MixtralSparseMoeBlock)
class MixtralSparseMoeBlock(SparseBlock, mixtral_decoder.MixtralSparseMoeBlock):
    """A router, and the experts it chooses."""


@replaces(keras_hub.models.MixtralBackbone)
class MixtralBackbone(keras_hub.models.MixtralBackbone, CachedBackbone):
    """Mixtral with a cache in its graph.

    A drop-in replacement for `keras_hub.models.MixtralBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.MixtralBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        num_experts=4,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2401.04088
    """


@replaces(keras_hub.models.MixtralCausalLM)
class MixtralCausalLM(CausalLM, keras_hub.models.MixtralCausalLM):
    """Mixtral that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.MixtralCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = MixtralBackbone
