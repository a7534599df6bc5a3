"""Phi-3: rotary positions, rescaled for long texts."""

import keras_hub
from keras import ops
from keras_hub.src.models.phi3 import phi3_attention
from keras_hub.src.models.phi3 import phi3_decoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.rotation import rotated
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(phi3_decoder.Phi3Decoder)


@replaces(phi3_attention.Phi3Attention)
class Phi3Attention(CachedAttention, phi3_attention.Phi3Attention):
    """Grouped-query attention that remembers."""

    dropout_of_heads = "dropout_layer"

    def rotate(self, x, positions):
        rotary = self.rotary()
        if self.rope_scaling_type is None:
            return super().rotate(x, positions)
        # Upstream's layer cannot be told positions of its own.
        length = ops.max(positions) + 1
        factor = ops.where(
            length > rotary.pretraining_sequence_length,
            ops.convert_to_tensor(rotary.inverese_freq_long_factor),
            ops.convert_to_tensor(rotary.inverese_freq_short_factor),
        )
        frequency = rotary._get_inverse_freq(x.shape[-1]) / factor
        return rotated(x, positions, frequency, rotary.embedding_scaling_factor)


@replaces(keras_hub.models.Phi3Backbone)
class Phi3Backbone(keras_hub.models.Phi3Backbone, CachedBackbone):
    """Phi-3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Phi3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    With `rope_scaling_type="su"`, positions are scaled by other factors from
    the call on that reaches beyond `pretraining_sequence_length`, as upstream
    does it. What was cached before stays as it was, so a text that grows beyond
    that length is not what one call makes of all of it. There is no sliding
    window, which some models of that name have.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Phi3Backbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2404.14219
    """


@replaces(keras_hub.models.Phi3CausalLM)
class Phi3CausalLM(CausalLM, keras_hub.models.Phi3CausalLM):
    """Phi-3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Phi3CausalLM`. See
    `CausalLM`.
    """

    backbone_cls = Phi3Backbone

    def turn_end_id(self):
        # 0 is what all tokens are that the vocabulary has not.
        return self.preprocessor.tokenizer.token_to_id("<|end|>") or None
