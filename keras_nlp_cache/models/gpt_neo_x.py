"""GPT-NeoX: rotary positions in a part of each head, one projection for all."""

import keras_hub
from keras import ops
from keras_hub.src.models.gpt_neo_x import gpt_neo_x_attention
from keras_hub.src.models.gpt_neo_x import gpt_neo_x_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(
    gpt_neo_x_decoder.GPTNeoXDecoder,
    # Upstream builds a dropout that it does not call.
    lambda block: {"feedforward": "_feedforward_output_dense"},
)


@replaces(gpt_neo_x_attention.GPTNeoXAttention)
class GPTNeoXAttention(CachedAttention, gpt_neo_x_attention.GPTNeoXAttention):
    """Multi-head attention that remembers."""

    projections = {"query_key_value": "_qkv_dense", "output": "_output_dense"}
    merges_heads = True
    dropout_of_weights = "_attn_dropout_layer"
    returns_cache = True

    @property
    def key_value_shape(self):
        return self.num_heads, self.attn_head_size

    def compute_query_shape(self, input_shape):
        return (*input_shape[:2], self.num_heads, self.attn_head_size)

    def project(self, x, positions):
        projected = self.projection("query_key_value")(x)
        query, key, value = ops.split(projected, 3, axis=-1)
        return self.rotate(query, positions), self.rotate(key, positions), value


@replaces(keras_hub.models.GPTNeoXBackbone)
class GPTNeoXBackbone(keras_hub.models.GPTNeoXBackbone, CachedBackbone):
    """GPT-NeoX with a cache in its graph.

    A drop-in replacement for `keras_hub.models.GPTNeoXBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Differs from upstream, on purpose: a step rotates its query by its own
    position, as a call without a cache does, not as the first one. And
    `enable_lora()` finds the projection that there is, where upstream's looks
    for those of other families and trains nothing. As upstream's, it has the
    activation of GPT-NeoX-20B, an approximation of GELU, and logits from its
    embeddings: it is not a Pythia.

    Example:

    ```python
    backbone = keras_nlp_cache.models.GPTNeoXBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2204.06745
    """

    def default_lora_layer_names(self):
        return ["query_key_value"]


@replaces(keras_hub.models.GPTNeoXCausalLM)
class GPTNeoXCausalLM(CausalLM, keras_hub.models.GPTNeoXCausalLM):
    """GPT-NeoX that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GPTNeoXCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = GPTNeoXBackbone
