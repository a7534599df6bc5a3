"""Gemma 3n: four streams, inputs for each layer, keys and values in common."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.models.gemma3n import layers  # noqa: F401 (replace upstream)
from keras_nlp_cache.models.gemma3n import text_model  # noqa: F401 (likewise)
from keras_nlp_cache.models.gemma3n.opened import OpenedBackbone


@replaces(keras_hub.models.Gemma3nBackbone)
class Gemma3nBackbone(keras_hub.models.Gemma3nBackbone, OpenedBackbone):
    """Gemma 3n with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma3nBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder`, how images are read. Sound is refused: upstream's encoder
    takes for padding what its preprocessor says is none, so that nothing of a
    clip is heard.

    Its decoder blocks take and return `altup_num_inputs` streams of hidden
    states, `(streams, B, T, hidden_dim)`. The last `num_kv_shared_layers` of
    them read the keys and values of the last one before these that is of their
    type, and have no entry in the cache.

    Images are `images` `(B, images, height, width, 3)`. Their tokens stand in
    the text, in one call all of them, and see what came before, as all others
    do. They are those with the id `image_token_id`, or where `vision_mask` `(B,
    T)` is not 0, which may leave out some, such as one that was generated.
    `vision_indices`, which upstream's preprocessor makes, says the same,
    counted from the first token of the call. Text needs none of these.

    Differs from upstream, on purpose: each row has its own images in its
    places. Upstream counts places and images over all rows, so that one that
    has fewer images than others, filled up, has the next one see these.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma3nBackbone(
        text_vocab_size=100, text_hidden_size=32, num_hidden_layers=4,
        pad_token_id=0, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=[64] * 4,
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4, rope_theta=1e6, max_position_embeddings=64,
        vocab_size_per_layer_input=100, hidden_size_per_layer_input=8,
        altup_num_inputs=4, laurel_rank=4, num_kv_shared_layers=2,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    len(cache)  # 2
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://huggingface.co/google/gemma-3n-E2B-it
    """
