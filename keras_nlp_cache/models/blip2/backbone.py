"""BLIP-2: what a Q-Former makes of an image, before a text that is read."""

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.blip2 import blip2_custom_opt

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.graph.encoder_decoder import EncoderDecoderBackbone
from keras_nlp_cache.graph.image_places import check_before_text
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.language_model import HasLanguageModel
from keras_nlp_cache.graph.roles import ENCODER_DECODER
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.layers.specializing import Specialized


@keras.saving.register_keras_serializable("keras_nlp_cache")
def gelu_approximate(x):
    """The activation of Flan-T5."""
    return keras.activations.gelu(x, approximate=True)


@replaces(blip2_custom_opt.BLIP2OPTEmbeddings)
class BLIP2OPTEmbeddings(Specialized, blip2_custom_opt.BLIP2OPTEmbeddings):
    """Embeddings of tokens, and of the positions of an image before them.

    Call arguments are upstream's, and:
        positions: Optional int `(B or 1, T)`, or `(B or 1, before + T)` with an
            image, where it and the tokens stand.
    """

    own_arguments = ("positions",)

    def call(
        self,
        token_ids,
        position_ids=None,
        visual_position_ids=None,
        training=None,
        positions=None,
    ):
        if positions is None:
            return super().call(
                token_ids, position_ids, visual_position_ids, training
            )
        before = ops.shape(positions)[1] - ops.shape(token_ids)[1]
        positions = positions + blip2_custom_opt.OPT_POSITION_OFFSET
        if isinstance(before, int) and before == 0:
            embedded = super().call(token_ids, positions, training=training)
            return embedded if visual_position_ids is None else (embedded, None)
        return super().call(
            token_ids, positions[:, before:], positions[:, :before], training
        )

    def compute_output_spec(self, *args, positions=None, **kwargs):
        return super().compute_output_spec(*args, **kwargs)


_PARTS_OF_OPT = {
    "embeddings_layer": "embeddings_layer",
    "language_projection": "language_projection",
    "transformer_layers": "transformer_layers",
    "layer_norm": "layer_norm",
}
_PARTS_OF_T5 = {
    "embeddings_layer": "t5.token_embedding",
    "language_projection": "language_projection",
    "encoder_transformer_layers": "t5.encoder_transformer_layers",
    "encoder_layer_norm": "t5.encoder_layer_norm",
    "decoder_transformer_layers": "t5.decoder_transformer_layers",
    "decoder_layer_norm": "t5.decoder_layer_norm",
    "lm_head": "lm_head",
}


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

    image_roles = Roles(
        images="images",
        image_embeddings="img_embeddings",
        embeddings="embeddings",
    )
    after_tower = ("qformer", "language_projection")
    made_of = ("vision_encoder", "qformer", "language_model")

    def __init__(
        self, vision_encoder, qformer, language_model, dtype=None, **kwargs
    ):
        _check_parts(vision_encoder, qformer, language_model)
        super().__init__(
            vision_encoder, qformer, language_model, dtype=dtype, **kwargs
        )

    @property
    def parts_of_language_model(self):
        model = self._language_model
        has_encoder = self.has_encoder if model is None else _is_t5(model)
        return _PARTS_OF_T5 if has_encoder else _PARTS_OF_OPT

    def roles_as_constructed(self):
        if not _is_t5(self.language_model):
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

    def check_images(self, images, text):
        check_before_text(images, text, self)


def reads_with_t5(config):
    """Whether a preset is of a model with Flan-T5.

    Args:
        config: Dictionary, what it says of the backbone, in the words of Keras
            or of transformers.
    """
    model = config.get("config", {}).get("language_model")
    if model is not None:
        return model["class_name"] == keras_hub.models.BLIP2FlanT5.__name__
    return config.get("text_config", {}).get("model_type") == "t5"


def _is_t5(language_model):
    return isinstance(language_model, keras_hub.models.BLIP2FlanT5)


def _check_parts(vision_encoder, qformer, language_model):
    """Raises a `ValueError` for models that do not go together."""
    expected = keras_hub.models.BLIP2CustomOPT, keras_hub.models.BLIP2FlanT5
    if not isinstance(language_model, expected):
        raise ValueError(
            "Expected `language_model` to be a "
            f"{' or a '.join(f'`{x.__name__}`' for x in expected)}. "
            f"Received an instance of {type(language_model).__name__}."
        )
    if (vision_encoder is None) != (qformer is None):
        raise ValueError(
            "Expected `vision_encoder` and `qformer`, or neither of them, for "
            f"text alone. Received: {vision_encoder!r} and {qformer!r}."
        )
    tokens = 0 if qformer is None else qformer.num_query_tokens
    if language_model.num_query_tokens != tokens:
        raise ValueError(
            "Expected a `language_model` with as many `num_query_tokens` as "
            f"the `qformer` has, {tokens}{' without one' * (not tokens)}. "
            f"Received: {language_model.num_query_tokens}."
        )
