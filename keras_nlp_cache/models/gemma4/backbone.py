"""The backbone of Gemma 4, and what it takes of images."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.graph.image_places import check_in_text
from keras_nlp_cache.graph.image_places import check_side_by_side
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
    `vision_encoder` or an `audio_encoder`, how images and sound are read.

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

    Sound is `audio_mel` `(B, clips, frames, mel_bins)`, and `audio_mel_mask`
    `(B, clips, frames)` is 0 for its padding. `audio_mask` and `audio_indices`
    say where its tokens are, as with images: these have as many places for each
    clip, and 0 for those that it does not need. A clip is read in one call, and
    its tokens see what came before, as those of text do. In the place of sound
    there may be `audio_embeddings`, what `encode_audio()` returns.

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
            Medium(
                "audio",
                "audio_mel",
                beside=("audio_mel_mask", "audio_indices", "audio_mask"),
                with_given=("audio_mel_mask",),
                output="audio_embeddings",
                tower="audio_encoder",
                join="audio_interleave_embeddings",
                axes={
                    "audio_mel": ("batch", "clips", "frames", "mel_bins"),
                    "audio_mel_mask": ("batch", "clips", "frames"),
                    "audio_embeddings": (
                        "batch",
                        "clips",
                        "length",
                        "hidden_dim",
                    ),
                },
                one="clip",
            ),
        ),
        embeddings="embeddings",
    )
    windows_in_spans = False

    def mend(self):
        if any(x.use_bidirectional_attention for x in self.blocks):
            raise ValueError(
                "Expected `use_bidirectional_attention` to be `False`. "
                "Received: True. Attention to what follows has no cache."
            )

    def new_spans(self, inputs, **kwargs):
        sees_ahead = self.blocks[0].use_vision_bidirectional_attention
        if not self.sees or not sees_ahead:
            return None
        return super().new_spans(inputs, **kwargs)

    def _normalize(self, inputs):
        if isinstance(inputs, dict):
            inputs = self.without_unread(inputs)
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

    # === Images and sound ===

    def without_unread(self, inputs):
        """The inputs without what says that there is nothing of a medium.

        Of one without a tower: preprocessors may make that for all of them.

        Args:
            inputs: Dictionary, as the backbone is called with.
        """
        unread = [
            x
            for x in self.media_roles.media
            if self.roles.medium(x.kind) is None
            and 0 in getattr(inputs.get(x.given), "shape", ())
        ]
        names = {name for x in unread for name in (x.given, *x.beside)}
        return {k: x for k, x in inputs.items() if k not in names}

    def unpacked(self, media):
        for medium in self.roles.media:
            media = self._unpacked(media, medium)
        return media

    def _unpacked(self, media, medium):
        shape = getattr(media.get(medium.given), "shape", ())
        *beside, places, _ = medium.beside
        if len(shape) == 4 and shape[1] == 0:
            # As upstream's preprocessor says that there are none.
            none = medium.given, *beside, places
            return {**media, **dict.fromkeys(none)}
        count, given = self._tokens_of(media, medium), media.get(places)
        if count is None or len(getattr(given, "shape", ())) != 2:
            return media
        # Upstream's preprocessor has places for more images.
        return {**media, places: given[:, : count[0] * count[1]]}

    def _tokens_of(self, media, medium):
        """`(images, tokens)` of what a tower returns, or `None`."""
        for name in (medium.given, medium.output):
            shape = getattr(media.get(name), "shape", ())
            if len(shape) != 4 or None in shape[1:3]:
                continue
            number, length = shape[1:3]
            if name == medium.given:
                length = self._length_of_output(medium, length)
            return number, length
        return None

    def _length_of_output(self, medium, length):
        """How many tokens a tower makes of one image, or of one clip.

        Args:
            medium: `Medium`.
            length: int. How many patches, or frames, that has.
        """
        if medium.kind == "image":
            return length // self.vision_encoder.pool_size**2
        encoder = self.audio_encoder
        kernels, strides = encoder.sscp_kernel_sizes, encoder.sscp_stride_sizes
        padding = 2 * (kernels[0][0] // 2)
        for (kernel, _), (stride, _) in zip(kernels, strides):
            length = (length + padding - kernel) // stride + 1
        return -(-length // encoder.reduction_factor)

    def tokens_of_clips(self, mask):
        """How many tokens of each clip are no padding.

        Args:
            mask: int array `(B, clips, frames)`, not 0 for what is none.

        Returns:
            int array `(B, clips)`.
        """
        encoder = self.audio_encoder
        strides = [stride for stride, _ in encoder.sscp_stride_sizes]
        for stride in (*strides, encoder.reduction_factor):
            mask = mask[..., ::stride]
        return (mask != 0).sum(axis=-1)

    def check_given(self, media):
        for medium in self.roles.media:
            (name,) = medium.with_given
            x, beside = media[medium.given], media[name]
            if (x is None) != (beside is None):
                raise ValueError(
                    f"Expected `{medium.given}` and `{name}`, or neither of "
                    f"them. Received: {_shape_of(x)} and {_shape_of(beside)}."
                )
            if x is not None:
                self._check_shapes(medium, x, beside)

    def _check_shapes(self, medium, x, beside):
        """Raises a `ValueError` if a tower does not read such patches."""
        expected = "audio_mel` of shape (batch, clips, frames, {}), and "
        expected += "`audio_mel_mask` (batch, clips, frames)"
        if medium.kind == "image":
            size = 3 * self.vision_encoder.patch_size**2
            expected = "pixel_values` of shape (batch, images, patches, {}), "
            expected += "and `pixel_position_ids` (batch, images, patches, 2)"
        else:
            size = self.audio_encoder.input_feat_size
        shapes = zip(x.shape[:3], beside.shape[:3])
        if x.shape[3] not in (None, size) or any(
            x != y for x, y in shapes if None not in (x, y)
        ):
            raise ValueError(
                f"Expected `{expected.format(size)}. Received shapes: "
                f"{tuple(x.shape)} and {tuple(beside.shape)}."
            )

    def check_media(self, media, text):
        for medium in self.roles.media:
            count = self._tokens_of_each(media, medium)
            if medium.kind == "image":
                check_in_text(media, text, self.roles, medium, count)
                continue
            # As many as a clip is long.
            check_in_text(media, text, self.roles, medium)
            check_side_by_side(media, medium, count)

    def _tokens_of_each(self, media, medium):
        """How many places each image has, `None` if that is not known.

        Of what the tower returns of one, upstream takes as many first ones as
        there are places for.
        """
        *_, name, _ = medium.beside
        found, places = self._tokens_of(media, medium), media[name]
        if found is None or places is None or places.shape[1] is None:
            return None
        number, most = found
        count = places.shape[1] // number
        if count * number != places.shape[1] or not count:
            raise ValueError(
                f"Expected `{name}` with as many places for each of "
                f"{number} {medium.noun}s, at most {most}. Received shape: "
                f"{tuple(places.shape)}."
            )
        return count


def _shape_of(x):
    return "none" if x is None else f"one of shape {tuple(x.shape)}"
