"""The task of Gemma 4."""

import keras_hub
import numpy as np
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.image_placeholders import check_clips
from keras_nlp_cache.generate.image_placeholders import clips_of
from keras_nlp_cache.generate.images_in_text_lm import ImagesInTextLM
from keras_nlp_cache.models.gemma4.backbone import Gemma4Backbone

reading.marks[keras_hub.models.Gemma4CausalLMPreprocessor] = {
    "image": "image_placeholder",
    "clip": "audio_placeholder",
}


@replaces(keras_hub.models.Gemma4CausalLM)
class Gemma4CausalLM(ImagesInTextLM, keras_hub.models.Gemma4CausalLM):
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
        given = {
            "audio_embeddings": audio_embeddings,
            "audio_indices": audio_indices,
            "audio_mask": audio_mask,
        }
        given = {name: x for name, x in given.items() if x is not None}
        return super().call_with_cache(
            token_ids,
            cache,
            cache_update_index,
            img_embeddings=img_embeddings,
            vision_mask=vision_mask,
            padding_mask=padding_mask,
            vision_indices=vision_indices,
            cache_update_mask=cache_update_mask,
            **given,
            **inputs,
        )

    # === How sound is read ===

    def check_media_of(self, inputs):
        super().check_media_of(inputs)
        if isinstance(inputs, dict):
            check_clips(inputs, self.preprocessor)

    def _normalize_generate_inputs(self, inputs):
        has_audio = isinstance(inputs, dict) and "audio" in inputs
        if has_audio and self.preprocessor is not None:
            prompts, clips = inputs["prompts"], clips_of(inputs)
            inputs = {k: x for k, x in inputs.items() if k != "audio"}
            if any(len(x) for x in clips):
                is_one = isinstance(prompts, str)
                inputs["audio"] = clips[0] if is_one else clips
        return super()._normalize_generate_inputs(inputs)

    def with_masks(self, inputs):
        inputs = super().with_masks(inputs)
        medium = self.backbone.roles.medium("audio")
        if medium is None or inputs.get(medium.given) is None:
            return inputs
        mask, places = inputs["audio_mel_mask"], inputs["audio_indices"]
        rows, number, frames = mask.shape
        places = places.reshape(rows, number, -1)
        needed = self.backbone.tokens_of_clips(mask)
        found = (places != 0).sum(axis=-1)
        if (found < needed).any():
            row, clip = np.argwhere(found < needed)[0]
            raise ValueError(
                "Expected prompts with a place for each token of their clips. "
                f"Received: {found[row, clip]} places for the "
                f"{needed[row, clip]} tokens of clip {clip} of prompt {row}. "
                "Raise `max_length`, or the preprocessor's `sequence_length`, "
                "so that no clip is cut, or pass a shorter one."
            )
        # As many for a short clip as for a long one, so that what reads one is
        # compiled once.
        most = self.backbone._length_of_output(medium, frames)
        room = max(0, most - places.shape[2])
        places = np.pad(places, ((0, 0), (0, 0), (0, room)))
        return {**inputs, "audio_indices": places.reshape(rows, -1)}

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
