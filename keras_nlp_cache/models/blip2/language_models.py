"""The language models of BLIP-2: OPT and Flan-T5."""

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.blip2 import blip2_custom_opt

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers.specializing import Specialized

# What the backbone calls what is inside of them.
PARTS_OF_OPT = {
    "embeddings_layer": "embeddings_layer",
    "language_projection": "language_projection",
    "transformer_layers": "transformer_layers",
    "layer_norm": "layer_norm",
}
PARTS_OF_T5 = {
    "embeddings_layer": "t5.token_embedding",
    "language_projection": "language_projection",
    "encoder_transformer_layers": "t5.encoder_transformer_layers",
    "encoder_layer_norm": "t5.encoder_layer_norm",
    "decoder_transformer_layers": "t5.decoder_transformer_layers",
    "decoder_layer_norm": "t5.decoder_layer_norm",
    "lm_head": "lm_head",
}


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


def is_t5(language_model):
    """Whether a language model has an encoder and a decoder."""
    return isinstance(language_model, keras_hub.models.BLIP2FlanT5)


def check_parts(vision_encoder, qformer, language_model):
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
