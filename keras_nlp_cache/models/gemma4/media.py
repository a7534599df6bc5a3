"""What Gemma 4 takes of images and of sound, and what its towers make of it."""

from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.media_places import check_in_text
from keras_nlp_cache.graph.media_places import check_side_by_side


class MediaInText(ImageTextBackbone):
    """Base of backbones with media in the text, each of any length.

    Of what is beside a medium, the last two say where its tokens are, and the
    others, which its tower takes, too, what is no padding of it.
    """

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
        media = self.without_empty(media)
        for medium in self.roles.media:
            *_, places, _ = medium.beside
            count, given = self._tokens_of(media, medium), media.get(places)
            if count is None or len(getattr(given, "shape", ())) != 2:
                continue
            # Upstream's preprocessor has places for more images.
            media = {**media, places: given[:, : count[0] * count[1]]}
        return media

    def _tokens_of(self, media, medium):
        """`(images, tokens)` of what a tower returns, or `None`."""
        for name in (medium.given, medium.output):
            shape = getattr(media.get(name), "shape", ())
            if len(shape) != 4 or None in shape[1:3]:
                continue
            number, length = shape[1:3]
            if name == medium.given:
                length = self.length_of_output(medium, length)
            return number, length
        return None

    def length_of_output(self, medium, length):
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
        if medium.kind == "image":
            size = 3 * self.vision_encoder.patch_size**2
            each, of_each = "batch, images, patches", ", 2"
        else:
            size = self.audio_encoder.input_feat_size
            each, of_each = "batch, clips, frames", ""
        shapes = zip(x.shape[:3], beside.shape[:3])
        if x.shape[3] not in (None, size) or any(
            x != y for x, y in shapes if None not in (x, y)
        ):
            raise ValueError(
                f"Expected `{medium.given}` of shape ({each}, {size}), and "
                f"`{medium.with_given[0]}` ({each}{of_each}). Received shapes: "
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
