"""gpt-oss: learned sinks, windows, a mixture of experts."""

import inspect

import keras_hub
from keras_hub.src.models.gpt_oss import gpt_oss_attention
from keras_hub.src.models.gpt_oss import gpt_oss_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.experts.mixture import ExpertBank
from keras_nlp_cache.experts.mixture import SparseBlock
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(gpt_oss_decoder.GptOssTransformerDecoder)


@replaces(gpt_oss_attention.GptOssAttention)
class GptOssAttention(CachedAttention, gpt_oss_attention.GptOssAttention):
    """Grouped-query attention that remembers, with a sink for each head."""

    dropout_of_heads = "dropout_layer"

    @property
    def sink(self):
        return self.sinks

    @property
    def window(self):
        # What `GptOssBackbone.mend()` says.
        return self.sliding_window + 1 if self.sliding_window else None


@replaces(gpt_oss_decoder.GptOssExperts)
class GptOssExperts(ExpertBank, gpt_oss_decoder.GptOssExperts):
    """Experts that are computed if they were chosen."""


@replaces(gpt_oss_decoder.GptOssSparseMoeBlock)
class GptOssSparseMoeBlock(SparseBlock, gpt_oss_decoder.GptOssSparseMoeBlock):
    """A router, and the experts it chooses."""

    def router_scores(self, x):
        return self.router.router_dense(x)


@replaces(keras_hub.models.GptOssBackbone)
class GptOssBackbone(keras_hub.models.GptOssBackbone, CachedBackbone):
    """gpt-oss with a cache in its graph.

    A drop-in replacement for `keras_hub.models.GptOssBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: every other layer sees `sliding_window`
    positions, beginning with the first, as the model was trained. Upstream
    begins with the second, and has them see one more. As in upstream's, 4096 is
    the length from which `rope_scaling_factor` stretches positions.

    Example:

    ```python
    backbone = keras_nlp_cache.models.GptOssBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        num_experts=4, sliding_window=4,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2508.10925
    """

    def __init__(self, *args, **kwargs):
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        given.apply_defaults()
        self._given_window = given.arguments["sliding_window"]
        super().__init__(*args, **kwargs)

    def mend(self):
        for i, block in enumerate(self.blocks):
            window = self._given_window if i % 2 == 0 else None
            # Upstream's attention counts the positions before the query's own.
            window = window and window - 1
            block.sliding_window = window
            block.self_attention_layer.sliding_window = window


@replaces(keras_hub.models.GptOssCausalLM)
class GptOssCausalLM(CausalLM, keras_hub.models.GptOssCausalLM):
    """gpt-oss that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GptOssCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = GptOssBackbone
