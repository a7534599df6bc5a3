"""Llama 3: the graph of Llama under a name of its own."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.models.llama import LlamaBackbone
from keras_nlp_cache.models.llama import LlamaCausalLM


@replaces(keras_hub.models.Llama3Backbone)
class Llama3Backbone(keras_hub.models.Llama3Backbone, LlamaBackbone):
    """Llama 3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Llama3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Llama3Backbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2407.21783
    """


@replaces(keras_hub.models.Llama3CausalLM)
class Llama3CausalLM(LlamaCausalLM, keras_hub.models.Llama3CausalLM):
    """Llama 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Llama3CausalLM`. See `CausalLM`.
    """

    backbone_cls = Llama3Backbone
