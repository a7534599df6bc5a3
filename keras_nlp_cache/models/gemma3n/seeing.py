"""What the backbone of Gemma 3n takes of images, and where they stand."""

import keras

from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.media_inputs import check_rows
from keras_nlp_cache.graph.media_inputs import known
from keras_nlp_cache.graph.media_places import check_in_text
from keras_nlp_cache.graph.media_places import places_of
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles

# What upstream's preprocessor says of sound, whether there is any.
_SOUND = (
    "input_features",
    "input_features_mask",
    "audio_indices",
    "audio_mask",
)


class ImagesByTokenBackbone(ImageTextBackbone):
    """A backbone in whose text the id of one token says where images stand.

    Attributes:
        image_tower: The layer that sees images, and embeds what it sees. `None`
            without a `vision_encoder`.
    """

    media_roles = Roles(
        media=(
            Medium(
                "image",
                "images",
                beside=("vision_indices", "vision_mask"),
                output="img_embeddings",
                tower="image_tower",
                join="images_in_text",
            ),
        ),
        placed_by_tokens=True,
        embeddings="embeddings",
    )

    @property
    def prefill_layers(self):
        if not self.sees:
            return []
        # What embeds features embeds tokens of images, too, in any step.
        return self.vision_encoder._flatten_layers()

    # === How it is called ===

    def _normalize(self, inputs):
        if isinstance(inputs, (list, tuple)):
            inputs = dict(zip(self.roles.of_upstream, inputs))
        if isinstance(inputs, dict):
            inputs = self.without_unread(inputs)
        return super()._normalize(inputs)

    def without_unread(self, inputs):
        """The inputs without those that say that there is no other medium.

        Raises:
            ValueError: If there is some, of a kind that is not read.
        """
        inputs, unread = dict(inputs), _SOUND
        if not self.sees:
            images = self.media_roles.images
            unread = images.given, *images.beside, *_SOUND
        for name in unread:
            x = inputs.pop(name, None)
            shape = tuple(getattr(x, "shape", ()))
            if name in ("images", "input_features") and shape:
                if shape[1] != 0 and not isinstance(x, keras.KerasTensor):
                    raise ValueError(
                        f"Expected no `{name}`, which this package does not "
                        f"read with a {type(self).__name__!r}. Received some "
                        f"of shape {shape}. Use the class of the same name "
                        "from `keras_hub.models`."
                    )
        return inputs

    # === Images ===

    def further_arguments(self, operation, inputs):
        if not self.sees:
            return {}
        return {
            self.image_tower: {"index": inputs["cache_update_index"]},
            self.images_in_text: {"vision_mask": inputs["vision_mask"]},
        }.get(operation, {})

    def new_spans(self, inputs, **kwargs):
        return None  # All is causal.

    def unpacked(self, media):
        return self.without_empty(media)

    def placed(self, images, token_ids):
        """What was passed of images, with where they are.

        As upstream's code finds them, where that is not passed.

        Args:
            images: Dictionary for some of `Roles.of_media`.
            token_ids: int `(B, T)`.

        Returns:
            The dictionary, with `vision_mask` and `vision_indices` if there are
            images, and unless it is not known which tokens there are.
        """
        tokens = known(token_ids)
        mask = images.get("vision_mask")
        if mask is None and tokens is not None:
            mask = (tokens == self.image_token_id).astype("int32")
        given = self._given(images)
        inside = known(mask)
        if given is None or inside is None:
            return images
        places = images.get("vision_indices")
        number = images[given].shape[1]
        if places is None and number is not None:
            most = int((inside != 0).sum(axis=1).max(initial=0))
            count = number * self.image_tower.tokens
            if most > count:
                raise ValueError(
                    f"Expected at most {count} tokens of images in a row, for "
                    f"`{given}` of shape {tuple(images[given].shape)}. "
                    f"Received: {most}, by their id, {self.image_token_id}, or "
                    "by `vision_mask`."
                )
            places = places_of(inside, count)
        return {**images, "vision_mask": mask, "vision_indices": places}

    def _given(self, images):
        """Under which name there are images, `None` if there are none."""
        names = self.roles.images.given, self.roles.images.output
        return next((x for x in names if images.get(x) is not None), None)

    def check_media(self, images, text):
        token_ids, given = text[self.roles.token_ids], self._given(images)
        if given is not None:
            check_rows(given, images[given], token_ids)
            images = self.placed(images, token_ids)
            if any(images[x] is None for x in self.roles.images.beside):
                return  # It is not known where they are.
        roles, count = self.roles, self.image_tower.tokens
        check_in_text(images, text, roles, roles.images, count)
        if given is not None:
            self._check_ids(known(images["vision_mask"]), known(token_ids))

    def _check_ids(self, mask, token_ids):
        """Raises a `ValueError` where upstream's code would put no image."""
        if mask is None or token_ids is None:
            return
        others = token_ids[(mask != 0) & (token_ids != self.image_token_id)]
        if len(others):
            raise ValueError(
                "Expected `vision_mask` to be 0 for all tokens but those of "
                f"images, which have the id {self.image_token_id}, the "
                "`image_token_id`. Received one that is not 0 for tokens with "
                f"the ids {sorted(set(others.tolist()))}."
            )
