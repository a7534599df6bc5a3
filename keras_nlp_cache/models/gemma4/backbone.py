"""The backbone of Gemma 4, and what it takes of images."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.graph.image_places import check_in_text
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.gemma4 import layers  # noqa: F401 (replace upstream)


@replaces(keras_hub.models.Gemma4Backbone)
class Gemma4Backbone(keras_hub.models.Gemma4Backbone, ImageTextBackbone):
    """Gemma 4 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma4Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder`, how images are read. Models that hear are not covered.

    The last `num_kv_shared_layers` layers read the keys and values of earlier
    ones, and have no entries in the cache. Global layers have as many heads, of
    as many numbers, as they are said to, and so have their entries. With
    `enable_moe_block`, a decode step reads the experts that tokens choose.

    `position_ids` `(B, T)` may be left out. With a cache, they are what
    `token_positions` are.

    Images are `pixel_values` `(B, images, patches, numbers)`, and where their
    patches are in them `pixel_position_ids` `(B, images, patches, 2)`. Their
    tokens stand in the text, in one call all of them: where `vision_mask` `(B,
    T)` is not 0, in the order of `vision_indices`, counted from the first token
    of the call. Text needs none of these. With
    `use_vision_bidirectional_attention`, they see each other in layers that are
    not global, with a cache, too, where upstream's `generate()` has them see
    what came before alone.

    Differs from upstream, on purpose: quantized, and with layers of the
    feed-forward network that an edit replaced, blocks compute what these layers
    do. Upstream's read the numbers that are stored in them.

    As upstream, and not as transformers 5.23: a token of an image sees all of
    the image, be it longer than `sliding_window_size`. There, the last ones do
    not see the first ones of such an image.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma4Backbone(
        vocabulary_size=100, image_size=16, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64, head_dim=8,
        sliding_window_pattern=2, num_kv_shared_layers=2,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    assert len(cache) == 2
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```
    """

    text_roles = Roles(beside_text=("position_ids",))
    media_roles = Roles(
        beside_text=("position_ids",),
        media=(
            Medium(
                "image",
                "pixel_values",
                beside=("pixel_position_ids", "vision_indices", "vision_mask"),
                with_given=("pixel_position_ids",),
                output="img_embeddings",
                join="interleave_embeddings",
            ),
        ),
        embeddings="embeddings",
    )
    windows_in_spans = False

    def inlined(self, outputs):
        if self.audio_encoder is not None:
            raise ValueError(
                "Expected `audio_encoder` to be `None`. Received: one of class "
                f"{type(self.audio_encoder).__name__!r}. Models that hear are "
                "keras_hub's."
            )
        return super().inlined(outputs)

    def mend(self):
        if any(x.use_bidirectional_attention for x in self.blocks):
            raise ValueError(
                "Expected `use_bidirectional_attention` to be `False`. "
                "Received: True. Attention to what follows has no cache."
            )

    def new_spans(self, inputs, **kwargs):
        if not self.blocks[0].use_vision_bidirectional_attention:
            return None
        return super().new_spans(inputs, **kwargs)

    def _normalize(self, inputs):
        inputs = super()._normalize(inputs)
        positions = inputs["position_ids"]
        is_ours = inputs["attention_mask"] is not None or (
            inputs["cache"][0][0] is not None
        )
        if positions is None or not is_ours:
            return inputs
        if inputs["token_positions"] is not None:
            raise ValueError(
                "Expected `position_ids` or `token_positions`, which are the "
                "same with a cache or an `attention_mask`. Received both, of "
                f"shapes {tuple(positions.shape)} and "
                f"{tuple(inputs['token_positions'].shape)}."
            )
        return {**inputs, "token_positions": positions, "position_ids": None}

    # === Images ===

    def unpacked(self, images):
        shape = getattr(images.get("pixel_values"), "shape", ())
        if len(shape) == 4 and shape[1] == 0:
            # As upstream's preprocessor says that there are none.
            none = "pixel_values", "pixel_position_ids", "vision_indices"
            return {**images, **dict.fromkeys(none)}
        count, places = self._tokens_seen(images), images.get("vision_indices")
        if count is None or len(getattr(places, "shape", ())) != 2:
            return images
        # Upstream's preprocessor has places for more images.
        return {**images, "vision_indices": places[:, : count[0] * count[1]]}

    def _tokens_seen(self, images):
        """`(images, tokens)` of what the tower returns, or `None`."""
        for name, pooled in (
            ("pixel_values", self.vision_encoder.pool_size**2),
            ("img_embeddings", 1),
        ):
            shape = getattr(images.get(name), "shape", ())
            if len(shape) == 4 and None not in shape[1:3]:
                return shape[1], shape[2] // pooled
        return None

    def check_given(self, images):
        pixels, positions = images["pixel_values"], images["pixel_position_ids"]
        if (pixels is None) != (positions is None):
            raise ValueError(
                "Expected `pixel_values` and `pixel_position_ids`, or neither "
                f"of them. Received: {_shape_of(pixels)} and "
                f"{_shape_of(positions)}."
            )
        if pixels is not None:
            self._check_pixels(pixels, positions)

    def check_media(self, images, text):
        roles, count = self.roles, self._tokens_of_each(images)
        check_in_text(images, text, roles, roles.images, count)

    def _check_pixels(self, pixels, positions):
        """Raises a `ValueError` if the tower does not see such patches."""
        count = 3 * self.vision_encoder.patch_size**2
        shapes = zip(pixels.shape[:3], positions.shape[:3])
        if pixels.shape[3] not in (None, count) or any(
            x != y for x, y in shapes if None not in (x, y)
        ):
            raise ValueError(
                f"Expected `pixel_values` of shape (batch, images, patches, "
                f"{count}), and `pixel_position_ids` (batch, images, patches, "
                f"2). Received shapes: {tuple(pixels.shape)} and "
                f"{tuple(positions.shape)}."
            )

    def _tokens_of_each(self, images):
        """How many tokens each image has, `None` if that is not known.

        Of what the tower returns of one, upstream takes as many first ones as
        there are places for.
        """
        seen, places = self._tokens_seen(images), images["vision_indices"]
        if seen is None or places is None or places.shape[1] is None:
            return None
        number, most = seen
        count = places.shape[1] // number
        if count * number != places.shape[1] or not count:
            raise ValueError(
                "Expected `vision_indices` with as many places for each of "
                f"{number} images, at most {most}. Received shape: "
                f"{tuple(places.shape)}."
            )
        return count


def _shape_of(x):
    return "none" if x is None else f"one of shape {tuple(x.shape)}"
