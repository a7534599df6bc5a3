"""The task that generates from a text in which images stand, or sound."""

import numpy as np
from keras import ops

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.generate.placeholders import check_placeholders


class ImagesInTextLM(ImageTextLM):
    """Base of tasks whose images stand in the place of tokens.

    Args are those of `ImageTextLM`. Of what is beside images, the last two say
    where their tokens are, and for which tokens it is not 0. So it is with all
    media.
    """

    sees_in_turns = True

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        img_embeddings=None,
        vision_mask=None,
        padding_mask=None,
        vision_indices=None,
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
            cache_update_mask: `None`. Rows that are not to be written have an
                index of their own here.
            **inputs: Further optional inputs of the backbone.
        """
        if cache_update_mask is not None:
            raise ValueError(
                "Expected no `cache_update_mask`. Received one of shape "
                f"{tuple(cache_update_mask.shape)}. Pass a "
                "`cache_update_index` for each row, `(B,)`."
            )
        return super().call_with_cache(
            token_ids,
            cache,
            cache_update_index,
            img_embeddings=img_embeddings,
            vision_mask=vision_mask,
            padding_mask=padding_mask,
            vision_indices=vision_indices,
            **inputs,
        )

    # === How images are read ===

    def check_media_of(self, inputs):
        placeholder = reading.mark_of("image", self.preprocessor)
        if placeholder is not None:
            most = self.preprocessor.max_images_per_prompt
            check_placeholders(inputs, placeholder, most)

    def with_masks(self, inputs):
        lengths = inputs["padding_mask"].astype(bool).sum(axis=1)
        last = lengths - 1
        for medium in self.backbone.roles.media:
            *_, name = medium.beside
            if name not in inputs:
                continue
            ends = np.flatnonzero(inputs[name][np.arange(len(last)), last])
            if len(ends):
                raise ValueError(
                    "Expected prompts to end with a token of text. Received: "
                    f"prompt {ends[0]}, which ends with one of "
                    f"{'an' if medium.noun == 'image' else 'a'} "
                    f"{medium.noun}, at {last[ends[0]]}."
                )
        return inputs

    def needed_with_images(self, mask, length):
        of_images = np.flatnonzero((mask != 0).any(axis=0))
        return of_images.max(initial=-1) + 1

    # === For sessions ===

    @property
    def tokens_of_image(self):
        """How many tokens an image becomes in a prompt."""
        return self.backbone.cuts.images.tower.shape[-2]

    def most_tokens_of(self, images):
        # Some are put around those of an image.
        return len(images) * (self.tokens_of_image + 8)

    def places_in(self, x, count):
        sizes = np.tile([1, self.tokens_of_image], (count, 1))
        *_, mask = self.backbone.roles.images.beside
        return np.flatnonzero(x[mask]), sizes

    def embeddings_of(self, x, count):
        images = self.backbone.roles.images
        names = images.given, *images.with_given
        seen = self._encode(
            images, {name: x[name][:, :count] for name in names}
        )
        # Some have a row of images for each text.
        tokens, dim = seen.shape[-2:]
        seen = ops.reshape(seen, (count, tokens, dim))
        return ops.reshape(seen[:, : self.tokens_of_image], (-1, dim))

    def source_in_turn(self, images, token_ids, start):
        new = images.since(start)
        medium, count = self.backbone.roles.images, len(new.sizes)
        *_, name_of_places, name_of_mask = medium.beside
        shape = count, -1, new.embeddings.shape[-1]
        if len(self.backbone.cuts.images.tower.shape) == 4:
            shape = 1, *shape
        mask = np.zeros((1, len(token_ids) - start), "int32")
        mask[0, new.places] = 1
        return {
            medium.output: ops.reshape(new.embeddings, shape),
            name_of_places: new.places[None],
            name_of_mask: mask,
        }

    # === For samplers with a loop of their own ===

    def build_cache_of(self, inputs, seen):
        return self._build_cache(
            inputs["token_ids"],
            seen.get("img_embeddings"),
            inputs["vision_mask"] if seen else None,
            inputs["padding_mask"],
            inputs["vision_indices"] if seen else None,
        )

    def _build_cache(
        self,
        token_ids,
        img_embeddings=None,
        vision_mask=None,
        padding_mask=None,
        vision_indices=None,
    ):
        cache = self.backbone.make_cache(*ops.shape(token_ids))
        images = {}
        if img_embeddings is not None:
            images = {
                "img_embeddings": img_embeddings,
                "vision_mask": vision_mask,
                "vision_indices": vision_indices,
            }
        return self.read(token_ids, cache, 0, **images)
