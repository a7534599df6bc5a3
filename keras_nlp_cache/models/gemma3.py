"""Gemma 3: queries and keys are normalized, two bases for positions, images."""

import keras_hub
from keras_hub.src.models.gemma3 import gemma3_attention
from keras_hub.src.models.gemma3 import gemma3_decoder_block
from keras_hub.src.models.gemma3 import gemma3_layers

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.images_in_text_lm import ImagesInTextLM
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.media_places import check_in_text
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.gemma import gemma_parts
from keras_nlp_cache.models.gemma import GemmaAttention
from keras_nlp_cache.models.gemma import scale_as_trained

decoder_block(gemma3_decoder_block.Gemma3DecoderBlock, gemma_parts)


@replaces(gemma3_attention.CachedGemma3Attention)
class CachedGemma3Attention(
    GemmaAttention, gemma3_attention.CachedGemma3Attention
):
    """Grouped-query attention that remembers."""


@replaces(keras_hub.models.Gemma3Backbone)
class Gemma3Backbone(keras_hub.models.Gemma3Backbone, ImageTextBackbone):
    """Gemma 3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder`, how images are read.

    Tokens of an image stand in the text, in one call all of them. They are
    where `vision_mask` `(B, T)` is not 0, and `vision_indices` says in which
    order, counted from the first token of the call. Text needs neither of them,
    and no `images`.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma3Backbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        head_dim=8, image_size=16,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Differs from upstream, on purpose: `query_head_dim_normalize=False`, as in
    Gemma 3 27B, and `layer_norm_epsilon` hold in all blocks. Upstream does not
    pass them on.

    Reference:
        https://arxiv.org/abs/2503.19786
    """

    media_roles = Roles(
        media=(
            Medium(
                "image",
                "images",
                beside=("vision_indices", "vision_mask"),
                output="img_embeddings",
            ),
        ),
        embeddings="embeddings",
    )

    def mend(self):
        if any(x.attention.use_bidirectional_attention for x in self.blocks):
            raise ValueError(
                "Expected `use_bidirectional_attention` to be `False`. "
                "Received: True. Attention to what follows has no cache."
            )
        scale_as_trained(self.blocks)
        for block in self.blocks:
            block.layer_norm_epsilon = self.layer_norm.epsilon
            for layer in block._flatten_layers():
                if isinstance(layer, gemma3_layers.RMSNormalization):
                    layer.epsilon = self.layer_norm.epsilon

    def unpacked(self, media):
        return self.without_empty(media)

    def check_media(self, media, text):
        roles, count = self.roles, self.num_vision_tokens_per_image
        check_in_text(media, text, roles, roles.images, count)


@replaces(keras_hub.models.Gemma3CausalLM)
class Gemma3CausalLM(ImagesInTextLM, keras_hub.models.Gemma3CausalLM):
    """Gemma 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma3CausalLM`. See
    `CausalLM`, and for images `ImageTextLM`.
    """

    backbone_cls = Gemma3Backbone

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<end_of_turn>")
