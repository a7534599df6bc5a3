"""OPT: the layers of GPT-2, learned positions beside its tokens."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone


@replaces(keras_hub.models.OPTBackbone)
class OPTBackbone(keras_hub.models.OPTBackbone, CachedBackbone):
    """OPT with a cache in its graph.

    A drop-in replacement for `keras_hub.models.OPTBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.OPTBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2205.01068
    """


@replaces(keras_hub.models.OPTCausalLM)
class OPTCausalLM(CausalLM, keras_hub.models.OPTCausalLM):
    """OPT that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.OPTCausalLM`. See
    `CausalLM`.
    """

    backbone_cls = OPTBackbone
    embeddings_name = "embeddings"
