"""Families that read sound with their text, and some of them images."""

import keras_hub
import numpy as np

from tests import text
from tests.families import IMAGE_MODELS
from tests.families import PatchesInText

LENGTH = 14
# Two clips in each row, the last of which is a short one, or is not there.
FRAMES = 21
CLIPS = np.random.default_rng(5).normal(size=(2, 2, FRAMES, 8))
CLIPS = CLIPS.astype("float32")
# What a user has of them: a tone, and noise.
WAVES = np.stack(
    [
        np.sin(np.arange(3000) / 3),
        np.random.default_rng(6).uniform(-1, 1, size=3000),
    ]
).astype("float32")
(SEEING,) = (x for x in IMAGE_MODELS if x.name == "gemma4_vision")


class SoundInText(PatchesInText):
    """A family in whose text sound stands, and images if it sees.

    Args are those of `Family`. `sees` among those of the backbone says whether
    there is a tower of images, too.
    """

    heard = "audio_mel"
    mark_of_sound = "<|audio|>"
    tower_of_sound = "audio_encoder"

    @property
    def sees(self):
        return dict(self._config)["sees"]

    @property
    def config(self):
        plain = tuple(x for x in self._config if x[0] != "sees")
        towers = [("audio_encoder", self.tower_that_hears())]
        if self.sees:
            towers.append(("vision_encoder", self.tower()))
        return *plain, *towers

    @config.setter
    def config(self, given):
        object.__setattr__(self, "_config", given)

    def tower_that_hears(self):
        return keras_hub.models.Gemma4AudioEncoder(
            input_feat_size=8,
            hidden_size=16,
            num_heads=2,
            num_layers=1,
            chunk_size=4,
            context_left=5,
            sscp_conv_channels=(4, 4),
            output_proj_dims=12,
            output_dim=32,
        )

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        # For two clips to be heard as different ones, and to matter.
        for weight in backbone.audio_encoder.weights:
            if weight.name == "bias":
                weight.assign(0 * weight)
            elif "audio_output_projection" in weight.path:
                weight.assign(8 * weight)
        return backbone

    def inputs(self, token_ids, padding_mask):
        """What a backbone is called with, for a batch of two.

        The first row has two clips of three tokens, the second one of them and
        one of two tokens. If there are images, they come after them.
        """
        found = self.with_clips(
            token_ids, padding_mask, [[1, 2, 3, 6, 7, 8], [2, 3, 4, 6, 7, 0]]
        )
        images = super().inputs(token_ids, padding_mask)
        return {**self.of_images(images), **found}

    def of_images(self, inputs):
        """What is said of images among inputs, which come after the clips."""
        if not self.sees:
            return {"position_ids": inputs["position_ids"]}
        indices = np.tile(np.arange(9, 13, dtype="int32"), (2, 1))
        mask = np.zeros_like(inputs["vision_mask"])
        mask[:, 9:13] = 1
        return {**inputs, "vision_indices": indices, "vision_mask": mask}

    def with_clips(self, token_ids, padding_mask, places):
        places = np.array(places, "int32")
        mask = np.zeros_like(token_ids)
        for row, of_row in zip(mask, places):
            row[of_row[of_row > 0]] = 1
        frames = np.ones((2, 2, FRAMES), "int32")
        count = places.shape[1] // 2
        frames[..., 4 * count :] = 0
        frames[1, 1, 4 * (places[1] != 0)[count:].sum() :] = 0
        return {
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "audio_mel": CLIPS,
            "audio_mel_mask": frames,
            "audio_indices": places,
            "audio_mask": mask,
        }

    def preprocessor(self, sequence_length=48):
        further = {}
        if self.sees:
            further = dict(
                image_converter=self.converter(),
                max_images_per_prompt=2,
                num_vision_tokens_per_image=4,
            )
        return self.upstream("CausalLMPreprocessor")(
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            audio_converter=keras_hub.layers.Gemma4AudioConverter(
                num_mels=8,
                num_fft_bins=512,
                stride=160,
                sampling_rate=3200,
                max_audio_length=1,
                max_frequency=1600.0,
            ),
            audio_input_feat_size=8,
            sequence_length=sequence_length,
            **further,
        )


_GEMMA4 = {
    **dict(SEEING._config),
    "use_vision_bidirectional_attention": False,
    "num_audio_tokens_per_clip": 6,
}
SOUND_MODELS = (
    SoundInText(
        "gemma4_sound",
        "Gemma4",
        # Where nothing else asks which tokens are of sound.
        tuple(dict(_GEMMA4, hidden_size_per_layer_input=0, sees=False).items()),
    ),
    SoundInText(
        "gemma4_sound_and_images",
        "Gemma4",
        tuple(dict(_GEMMA4, sees=True).items()),
    ),
)
