"""What Gemma 3n makes of images, and where they are put into a text."""

import keras
from keras import ops

from keras_nlp_cache.models.gemma3n.inputs import OfProcessor


class _Soft:
    """What embeds features of images, for code that is to embed no tokens.

    Upstream's asks whether it is there before it embeds those of a vocabulary
    of images, and not before it embeds features.
    """

    def __init__(self, layer):
        self._layer = layer

    def __bool__(self):
        return False

    def __call__(self, features):
        return self._layer(features)


class _WithoutDummy:
    """A tower that does not see the image that upstream's code adds to others.

    It is there to be seen where there are no others.
    """

    def __init__(self, layer):
        self._layer = layer

    def __getattr__(self, name):
        return getattr(self._layer, name)

    def __call__(self, images):
        return self._layer(images[:-1])


class ImageTower(OfProcessor):
    """Sees images, and embeds what it sees as the text is embedded.

    Upstream's code puts that into a text. Here it is into one of nothing but
    images.

    Call arguments:
        images: Tensor `(B, N, height, width, 3)`.
        index: Optional, of a call with a cache. Without, the tower sees one
            image more than there are, as upstream's does: of how many it sees
            at once depends how numbers are rounded.

    Returns:
        Tensor `(B, N, tokens, hidden_dim)`.

    Attributes:
        tokens: int. How many tokens an image becomes.
    """

    def __init__(self, processor, **kwargs):
        super().__init__(processor, **kwargs)
        self.vision_encoder = processor.vision_encoder
        self.embed_vision = processor.embed_vision
        self.hidden_dim = processor.text_hidden_size
        shape = self.vision_encoder.output_shape
        first = self.vision_encoder.data_format == "channels_first"
        height, width = shape[2:] if first else shape[1:3]
        self.tokens = height * width

    def call(self, images, index=None):
        rows, number = ops.shape(images)[:2]
        tower = self.vision_encoder
        if index is not None and 0 not in images.shape:
            if None not in images.shape[:2]:
                tower = _WithoutDummy(tower)
        shape = rows, number * self.tokens
        embeddings, _ = self.run(
            ops.zeros(shape, "int32") + self.constants["image_token_id"],
            ops.zeros((*shape, self.hidden_dim), self.compute_dtype),
            images,
            vision_encoder=tower,
            embed_vision=_Soft(self.embed_vision),
        )
        shape = rows, number, self.tokens, self.hidden_dim
        return ops.reshape(embeddings, shape)

    def compute_output_spec(self, images, index=None):
        shape = *images.shape[:2], self.tokens, self.hidden_dim
        return keras.KerasTensor(shape, self.compute_dtype)


class ImagesInText(keras.layers.Layer):
    """Puts what images became in the place of tokens.

    Each row has images of its own, and may have more than it has places for.

    Args:
        image_token_id: int. The id of tokens that images are put in the place
            of, if nothing else says where.

    Call arguments:
        images: Tensor `(B, N, tokens, hidden_dim)`.
        text: Tensor `(B, T, hidden_dim)`.
        token_ids: int tensor `(B, T)`.
        vision_mask: Optional tensor `(B, T)`, not 0 for tokens of images.

    Returns:
        A tensor like `text`.
    """

    def __init__(self, image_token_id, **kwargs):
        super().__init__(**kwargs)
        self.image_token_id = image_token_id
        self.built = True

    def call(self, images, text, token_ids, vision_mask=None):
        if vision_mask is None:
            inside = ops.equal(token_ids, self.image_token_id)
        else:
            inside = ops.not_equal(vision_mask, 0)
        rows, number, tokens, dim = ops.shape(images)
        count = number * tokens
        place = ops.cumsum(ops.cast(inside, "int32"), axis=1) - 1
        inside = ops.logical_and(inside, place < count)
        # With one more, which nothing reads: there may be no images.
        images = ops.reshape(images, (rows * count, dim))
        images = ops.pad(images, ((0, 1), (0, 0)))
        first = count * ops.arange(rows, dtype="int32")
        place = ops.where(inside, place + first[:, None], 0)
        return ops.where(
            inside[..., None], ops.take(images, place, axis=0), text
        )

    def compute_output_spec(self, images, text, token_ids, vision_mask=None):
        return keras.KerasTensor(text.shape, text.dtype)

    def get_config(self):
        return {**super().get_config(), "image_token_id": self.image_token_id}
