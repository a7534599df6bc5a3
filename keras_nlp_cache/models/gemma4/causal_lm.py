"""The task of Gemma 4."""

import keras_hub
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.images_in_text_lm import ImagesInTextLM
from keras_nlp_cache.models.gemma4.backbone import Gemma4Backbone

reading.image_marks[keras_hub.models.Gemma4CausalLMPreprocessor] = (
    "image_placeholder"
)


@replaces(keras_hub.models.Gemma4CausalLM)
class Gemma4CausalLM(ImagesInTextLM, keras_hub.models.Gemma4CausalLM):
    """Gemma 4 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma4CausalLM`. See `CausalLM`,
    and for images `ImageTextLM`.

    Frames of `videos` are images. They are refused where they have fewer tokens
    than the preprocessor has places for, which upstream mixes up.

    Differs from upstream, on purpose: with
    `use_vision_bidirectional_attention`, `generate()` says what the model does
    without a cache. Upstream's has tokens of an image not see what follows them
    then.
    """

    backbone_cls = Gemma4Backbone
    returns_images = False

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<turn|>")

    def check_media_of(self, inputs):
        if inputs.get("audio") is not None:
            raise ValueError(
                "Expected prompts with `images`, or with `videos`, whose "
                "frames are images. Received `audio`. Models that hear are "
                "keras_hub's."
            )
        super().check_media_of(inputs)

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
            inputs = {**dict.fromkeys(self.backbone.input), **inputs}
        return super().__call__(inputs, *args, **kwargs)
