"""BLIP-2: what a Q-Former makes of an image, before a text that is read."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.graph.encoder_decoder import EncoderDecoderBackbone
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.language_model import HasLanguageModel
from keras_nlp_cache.graph.media_places import check_before_text
from keras_nlp_cache.graph.roles import ENCODER_DECODER
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.blip2.language_models import check_parts
from keras_nlp_cache.models.blip2.language_models import gelu_approximate
from keras_nlp_cache.models.blip2.language_models import is_t5
from keras_nlp_cache.models.blip2.language_models import PARTS_OF_OPT
from keras_nlp_cache.models.blip2.language_models import PARTS_OF_T5


@replaces(keras_hub.models.BLIP2Backbone)
class BLIP2Backbone(
    HasLanguageModel,
    keras_hub.models.BLIP2Backbone,
    ImageTextBackbone,
    EncoderDecoderBackbone,
):
    """BLIP-2 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.BLIP2Backbone`: the same
    arguments, weights and files.

    With OPT, `ImageTextBackbone` describes what it can be called with beyond
    upstream's inputs. What the Q-Former makes of an image takes the first
    `before` slots of a cache. Text alone stands from the first slot on, as in
    the language model.

    With Flan-T5, it is `EncoderDecoderBackbone` that does. The encoder reads
    what the Q-Former makes of `"images"` before `"encoder_token_ids"`, and of
    both the decoder reads what is in the cache. Here, too, text may be read
    without an image. Hidden states alone are returned, those of the decoder.

    Example:

    ```python
    backbone = keras_nlp_cache.models.BLIP2Backbone(
        vision_encoder=keras_hub.models.BLIP2VisionEncoder(
            image_size=16, patch_size=8, num_layers=1, num_heads=2,
            hidden_dim=16, intermediate_dim=24, use_patch_bias=True,
            use_class_token=True, use_mha_bias=True, use_mlp_bias=True,
            dropout_rate=0.0, layer_norm_epsilon=1e-6, initializer_range=0.02,
        ),
        qformer=keras_hub.models.BLIP2QFormer(
            num_query_tokens=4, num_layers=2, num_heads=2, hidden_dim=24,
            intermediate_dim=32, vision_dim=16, cross_attention_frequency=2,
            dropout=0.0, layer_norm_epsilon=1e-12,
        ),
        language_model=keras_hub.models.BLIP2CustomOPT(
            vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
            intermediate_dim=64, num_query_tokens=4, dropout=0.0,
            max_sequence_length=64, qformer_hidden_dim=24,
        ),
    )
    cache = backbone.make_cache(batch_size=1, max_length=16)
    hidden_states, cache = backbone({
        "images": np.ones((1, 16, 16, 3)),
        "token_ids": [[1, 2, 3]],
        "cache": cache,
        "cache_update_index": 0,
    })
    ```

    Differs from upstream, on purpose: a text without an image can be read, and
    stands where text stands that OPT reads. The activation of Flan-T5 is the
    approximation of GELU that it was trained with. Upstream's is GELU.

    Reference:
        https://arxiv.org/abs/2301.12597
    """

    media_roles = Roles(
        media=(
            Medium(
                "image",
                "images",
                output="img_embeddings",
                after_tower=("qformer", "language_projection"),
            ),
        ),
        embeddings="embeddings",
    )
    made_of = ("vision_encoder", "qformer", "language_model")

    def __init__(
        self, vision_encoder, qformer, language_model, dtype=None, **kwargs
    ):
        check_parts(vision_encoder, qformer, language_model)
        super().__init__(
            vision_encoder, qformer, language_model, dtype=dtype, **kwargs
        )

    @property
    def parts_of_language_model(self):
        model = self._language_model
        has_encoder = self.has_encoder if model is None else is_t5(model)
        return PARTS_OF_T5 if has_encoder else PARTS_OF_OPT

    def roles_as_constructed(self):
        if not is_t5(self.language_model):
            return super().roles_as_constructed()
        if self.vision_encoder is None:
            return ENCODER_DECODER
        return ENCODER_DECODER._replace(beside_source=("images",))

    @property
    def blocks_name(self):
        if self.has_encoder:
            return "decoder_transformer_layers"
        return "transformer_layers"

    @property
    def before(self):
        return 0 if self.has_encoder else self.num_query_tokens

    def encoded_length(self, length, beside=None):
        if beside is None or beside.get("images") is None:
            return length
        return self.num_query_tokens + length

    @property
    def token_embedding(self):
        """The layer that embeds tokens."""
        if self.has_encoder:
            return self.embeddings_layer
        return self.embeddings_layer.token_embedding

    @property
    def output_embedding(self):
        return self.lm_head if self.has_encoder else self.token_embedding

    @property
    def max_positions(self):
        if self.has_encoder:
            return super().max_positions
        return self.embeddings_layer.max_sequence_length

    def mend(self):
        if self.has_encoder:
            for block in (*self.encoder_blocks, *self.blocks):
                block.input_projector.activation = gelu_approximate

    def new_spans(self, inputs, **kwargs):
        return None  # All is causal.

    def check_media(self, media, text):
        check_before_text(media, text, self)
