"""GPT-2: learned positions, a key/value head for each query head."""

import keras_hub

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone

decoder_block(keras_hub.layers.TransformerDecoder)


@replaces(keras_hub.layers.CachedMultiHeadAttention)
class CachedMultiHeadAttention(
    CachedAttention, keras_hub.layers.CachedMultiHeadAttention
):
    """Multi-head attention that remembers."""

    dropout_of_weights = "_dropout_layer"

    @property
    def scale(self):
        return self._key_dim**-0.5


@replaces(keras_hub.models.GPT2Backbone)
class GPT2Backbone(keras_hub.models.GPT2Backbone, CachedBackbone):
    """GPT-2 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.GPT2Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.GPT2Backbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
    """


@replaces(keras_hub.models.GPT2CausalLM)
class GPT2CausalLM(CausalLM, keras_hub.models.GPT2CausalLM):
    """GPT-2 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.GPT2CausalLM`. See `CausalLM`.
    """

    backbone_cls = GPT2Backbone
    embeddings_name = "embeddings_add"
