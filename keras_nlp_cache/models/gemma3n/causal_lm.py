"""What Gemma 3n says of a text, in which images may stand."""

import keras_hub
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.images_in_text_lm import ImagesInTextLM
from keras_nlp_cache.graph.media_inputs import known
from keras_nlp_cache.models.gemma3n.backbone import Gemma3nBackbone


@replaces(keras_hub.models.Gemma3nCausalLM)
class Gemma3nCausalLM(ImagesInTextLM, keras_hub.models.Gemma3nCausalLM):
    """Gemma 3n that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma3nCausalLM`. See
    `CausalLM`, and for images `ImageTextLM`.

    Differs from upstream, on purpose: what the model returns when it is called
    follows the weights of its embedding. Upstream's goes on with those that it
    was constructed with, whatever is loaded or trained. And each prompt has its
    own images: see `Gemma3nBackbone`.
    """

    backbone_cls = Gemma3nBackbone
    returns_images = False

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<end_of_turn>")

    def __call__(self, inputs, *args, **kwargs):
        # Upstream's has to be told of images, and of sound.
        if isinstance(inputs, dict):
            inputs = self.backbone.without_unread(inputs)
            inputs = {**dict.fromkeys(self._inputs_struct), **inputs}
        return super().__call__(inputs, *args, **kwargs)

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        pixel_values=None,
        input_features=None,
        input_features_mask=None,
        vision_indices=None,
        audio_indices=None,
        vision_mask=None,
        audio_mask=None,
        padding_mask=None,
        cache_update_mask=None,
        **inputs,
    ):
        """Runs the model on some tokens of a sequence.

        Upstream's method, with its arguments and its results.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: As for `CausalLM.call_with_cache()`.
            cache_update_index: int scalar, the slot of the first token.
            pixel_values: Optional images `(B, N, height, width, 3)`, or what
                `encode_images()` made of them.
            input_features: `None`, or of no clips: there is no sound.
            input_features_mask: As `input_features`.
            vision_indices: Optional int, where tokens of images are.
            audio_indices: As `input_features`.
            vision_mask: Optional `(B, T)`, not 0 for tokens of images.
            audio_mask: As `input_features`.
            padding_mask: Optional, as for the backbone.
            cache_update_mask: `None`. Rows that are not to be written have an
                index of their own here.
            **inputs: Further optional inputs of the backbone.
        """
        inputs |= self._media(pixel_values, input_features)
        return super().call_with_cache(
            token_ids,
            cache,
            cache_update_index,
            vision_mask=vision_mask,
            padding_mask=padding_mask,
            vision_indices=vision_indices,
            cache_update_mask=cache_update_mask,
            **inputs,
        )

    # === How images are read ===

    def _generate(self, inputs, stop_token_ids=None):
        if isinstance(inputs, dict):
            self.backbone.without_unread(inputs)
        return super()._generate(inputs, stop_token_ids)

    def _check_text_alone(self, inputs, media):
        super()._check_text_alone(inputs, media)
        if media or not self.backbone.sees or not isinstance(inputs, dict):
            return
        tokens = known(inputs.get("token_ids"))
        image = self.backbone.image_token_id
        if tokens is not None and (tokens == image).any():
            raise ValueError(
                f"Expected `images` for the tokens with the id {image}, the "
                "`image_token_id`, which stand for some. Received: none, for "
                f"{int((tokens == image).sum())} such tokens."
            )

    def with_masks(self, inputs):
        return super().with_masks(
            self.backbone.placed(inputs, inputs["token_ids"])
        )

    def build_cache_of(self, inputs, seen):
        places = inputs if seen else {}
        return self._build_cache(
            inputs["token_ids"],
            pixel_values=seen.get("img_embeddings"),
            input_features=None,
            input_features_mask=None,
            vision_indices=places.get("vision_indices"),
            audio_indices=None,
            vision_mask=places.get("vision_mask"),
            audio_mask=None,
            padding_mask=inputs["padding_mask"],
        )

    def _build_cache(
        self,
        token_ids,
        pixel_values=None,
        input_features=None,
        input_features_mask=None,
        vision_indices=None,
        audio_indices=None,
        vision_mask=None,
        audio_mask=None,
        padding_mask=None,
    ):
        cache = self.backbone.make_cache(*ops.shape(token_ids))
        given = self._media(pixel_values, input_features)
        given |= {"vision_indices": vision_indices, "vision_mask": vision_mask}
        given = {name: x for name, x in given.items() if x is not None}
        return self.read(token_ids, cache, 0, **given)

    def _media(self, pixel_values, input_features):
        """What the backbone takes for images, seen or not, and for sound."""
        images, given = self.backbone.media_roles.images, {}
        if pixel_values is not None:
            was_seen = len(pixel_values.shape) == 4
            name = images.output if was_seen else images.given
            given[name] = pixel_values
        if input_features is not None:
            given["input_features"] = input_features
        return given
