"""How Gemma 4 reads sound with a prompt."""

import numpy as np

from keras_nlp_cache.generate.images_in_text_lm import ImagesInTextLM
from keras_nlp_cache.generate.placeholders import check_clips
from keras_nlp_cache.generate.placeholders import clips_of


class HearsInText(ImagesInTextLM):
    """Base of tasks for prompts with clips, beside images or alone.

    Args are those of `ImageTextLM`.
    """

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
        most = self.backbone.length_of_output(medium, frames)
        room = max(0, most - places.shape[2])
        places = np.pad(places, ((0, 0), (0, 0), (0, room)))
        return {**inputs, "audio_indices": places.reshape(rows, -1)}
