"""The task of Gemma 4."""

import keras_hub
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate import reading
from keras_nlp_cache.models.gemma4.backbone import Gemma4Backbone
from keras_nlp_cache.models.gemma4.hearing import HearsInText

reading.marks[keras_hub.models.Gemma4CausalLMPreprocessor] = {
    "image": "image_placeholder",
    "clip": "audio_placeholder",
}


@replaces(keras_hub.models.Gemma4CausalLM)
class Gemma4CausalLM(HearsInText, keras_hub.models.Gemma4CausalLM):
    """Gemma 4 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma4CausalLM`. See `CausalLM`,
    and for images and sound `ImageTextLM`.

    Frames of `videos` are images. They are refused where they have fewer tokens
    than the preprocessor has places for, which upstream mixes up.

    `audio` is a clip for each prompt that has `"<|audio|>"` in it, of floating
    numbers `(samples,)`. Prompts without one have an empty clip, or `None`.
    Upstream's preprocessor reads no more than one for a prompt, and of that the
    first `max_audio_length` seconds. Where a prompt has several, pass what the
    backbone takes, to a task without a preprocessor.

    Differs from upstream, on purpose: with
    `use_vision_bidirectional_attention`, `generate()` says what the model does
    without a cache. Upstream's has tokens of an image not see what follows them
    then.
    """

    backbone_cls = Gemma4Backbone
    returns_images = False

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<turn|>")

    @property
    def tokens_of_image(self):
        return self.preprocessor.num_vision_tokens_per_image

    def _logits(self, hidden_states):
        logits = super()._logits(hidden_states)
        cap = self.final_logit_cap
        return logits if cap is None else ops.tanh(logits / cap) * cap

    def __call__(self, inputs, *args, **kwargs):
        # Upstream's has to be told where tokens stand, and of images.
        if isinstance(inputs, dict):
            inputs = self.backbone.without_unread(inputs)
            inputs = {**dict.fromkeys(self.backbone.input), **inputs}
        return super().__call__(inputs, *args, **kwargs)

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        img_embeddings=None,
        vision_mask=None,
        padding_mask=None,
        vision_indices=None,
        audio_embeddings=None,
        audio_indices=None,
        audio_mask=None,
        cache_update_mask=None,
        **inputs,
    ):
        """Runs the model on some tokens of a sequence.

        Upstream's method, with its arguments and its results.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: As for `CausalLM.call_with_cache()`.
            cache_update_index: int scalar, the slot of the first token.
            img_embeddings: Optional, from `encode_images()`.
            vision_mask: Optional `(B, T)`, not 0 for tokens of images.
            padding_mask: Optional, as for the backbone.
            vision_indices: Optional int, where tokens of images are.
            audio_embeddings: Optional, from `encode_audio()`.
            audio_indices: Optional int, where tokens of clips are.
            audio_mask: Optional `(B, T)`, not 0 for tokens of clips.
            cache_update_mask: `None`. Rows that are not to be written have an
                index of their own here.
            **inputs: Further optional inputs of the backbone.
        """
        return super().call_with_cache(
            token_ids,
            cache,
            cache_update_index,
            img_embeddings=img_embeddings,
            vision_mask=vision_mask,
            padding_mask=padding_mask,
            vision_indices=vision_indices,
            audio_embeddings=audio_embeddings,
            audio_indices=audio_indices,
            audio_mask=audio_mask,
            cache_update_mask=cache_update_mask,
            **inputs,
        )

    # === For samplers with a loop of their own ===

    def build_cache_of(self, inputs, seen):
        def beside(kind, name):
            medium = self.backbone.roles.medium(kind)
            there = medium is not None and medium.output in seen
            return inputs[name] if there else None

        return self._build_cache(
            inputs["token_ids"],
            seen.get("img_embeddings"),
            beside("image", "vision_mask"),
            inputs["padding_mask"],
            beside("image", "vision_indices"),
            seen.get("audio_embeddings"),
            beside("audio", "audio_indices"),
            beside("audio", "audio_mask"),
        )

    def _build_cache(
        self,
        token_ids,
        img_embeddings=None,
        vision_mask=None,
        padding_mask=None,
        vision_indices=None,
        audio_embeddings=None,
        audio_indices=None,
        audio_mask=None,
    ):
        cache = self.backbone.make_cache(*ops.shape(token_ids))
        given = {}
        if img_embeddings is not None:
            given |= {
                "img_embeddings": img_embeddings,
                "vision_mask": vision_mask,
                "vision_indices": vision_indices,
            }
        if audio_embeddings is not None:
            given |= {
                "audio_embeddings": audio_embeddings,
                "audio_mask": audio_mask,
                "audio_indices": audio_indices,
            }
        return self.read(token_ids, cache, 0, **given)
