"""What BLIP-2 says of an image, with OPT."""

import keras_hub
import numpy as np
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.models.blip2.backbone import BLIP2Backbone
from keras_nlp_cache.models.blip2.language_models import reads_with_t5


@replaces(keras_hub.models.BLIP2CausalLM)
class BLIP2CausalLM(ImageTextLM, keras_hub.models.BLIP2CausalLM):
    """BLIP-2 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.BLIP2CausalLM`. See
    `ImageTextLM`.

    Differs from upstream, on purpose: a prompt without an image is read as OPT
    reads text. Upstream's has all of its tokens stand in one place.
    """

    backbone_cls = BLIP2Backbone
    embeddings_name = "embeddings_layer"

    @classmethod
    def is_for(cls, config):
        return not reads_with_t5(config)

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        projected_features=None,
        padding_mask=None,
        **inputs,
    ):
        """Runs the model on some tokens of a sequence.

        Upstream's method, with its arguments and its results.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: As for `CausalLM.call_with_cache()`.
            cache_update_index: int scalar, the slot of the first token, or of
                the image before it.
            projected_features: Optional `(B, before, hidden_dim)`, from
                `backbone.encode_images()`.
            padding_mask: Optional `(B, T)` with these, 0 for padding.
                Otherwise as for the backbone.
            **inputs: Further optional inputs of the backbone.

        Returns:
            `(logits, hidden_states, cache)`. The logits are of the tokens
            alone.
        """
        if projected_features is not None:
            inputs["img_embeddings"] = projected_features
            if padding_mask is not None:
                padding_mask = self._of_slots(padding_mask, cache)
        if padding_mask is not None:
            inputs["padding_mask"] = padding_mask
        hidden_states, cache = self.run_backbone(
            token_ids, cache, cache_update_index, **inputs
        )
        of_text = hidden_states[:, -ops.shape(token_ids)[1] :]
        return self._logits(of_text), hidden_states, cache

    def _of_slots(self, padding_mask, cache):
        """The same, of all slots: the image's, these, and what follows."""
        (shape,) = {tuple(x.shape) for x in cache[0]}
        padding_mask = ops.cast(padding_mask, "int32")
        after = shape[2] - self.backbone.before - ops.shape(padding_mask)[1]
        return ops.pad(
            padding_mask,
            ((0, 0), (self.backbone.before, after)),
            constant_values=1,
        )

    # === How images are read ===

    def check_media_of(self, inputs):
        if not {"text", "prompts", "token_ids"} & set(inputs):
            raise ValueError(
                "Expected `inputs` with `text`, a string or one for each "
                f"image. Received the keys {sorted(inputs)}. Without a prompt, "
                'pass `""`.'
            )

    # Upstream's takes nothing with a column for each token that is read with
    # an image: any number of them may be.
    names_of_masks = ("columns",)

    def fitted_source(self, source, length, slots, chunk):
        columns = np.zeros((1, length), "int32")
        return super().fitted_source(
            {**source, "columns": columns}, length, slots, chunk
        )

    def read_source(self, token_ids, cache, source):
        tokens = token_ids[:, self.backbone.before : self.read_with(source)]
        source = {k: x for k, x in source.items() if k != "columns"}
        return self.read(tokens, cache, 0, **source)[1]

    def needed_with_images(self, mask, length):
        return self.backbone.before + 1

    def build_cache_of(self, inputs, seen):
        return self._build_cache(
            inputs["token_ids"],
            seen.get("img_embeddings"),
            inputs["padding_mask"],
        )

    def _build_cache(self, token_ids, projected_features, padding_mask):
        rows, length = ops.shape(token_ids)
        if projected_features is not None:
            length += self.backbone.before
        cache = self.backbone.make_cache(rows, length)
        images = {}
        if projected_features is not None:
            images["img_embeddings"] = projected_features
        return self.read(token_ids, cache, 0, **images)
