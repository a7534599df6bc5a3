"""What the inputs of a graph are for, whatever they are called."""

import typing


class Roles(typing.NamedTuple):
    """Names of the inputs of a backbone, by what they are for.

    Args:
        token_ids: The text that is generated.
        padding_mask: Which of its slots are padding.
        beside_text: Names of what else upstream's backbone takes with the
            text, one number for each token.
        source_ids: What an encoder reads, `None` without an encoder.
        source_mask: Which of that is padding.
        source: The output of the encoder. Given, the encoder does not run.
        beside_source: Names of what else the encoder reads, if it is there,
            such as images before its text.
        images: What a tower of layers sees, `None` without one.
        beside_images: Names of what upstream's backbone takes with them. The
            last one has a column for each token of the text.
        with_images: Those of these that the tower takes, too.
        placed_by_tokens: Whether upstream's backbone takes none of what is
            beside images, and has them where tokens have the id for it.
        image_embeddings: The output of the tower.
        embeddings: That and the embedded text, as one sequence.
        grid_positions: Where tokens stand if those of an image stand in a grid,
            `None` if all stand in a row.
    """

    token_ids: str = "token_ids"
    padding_mask: str = "padding_mask"
    beside_text: tuple = ()
    source_ids: str | None = None
    source_mask: str | None = None
    source: str | None = None
    beside_source: tuple = ()
    images: str | None = None
    beside_images: tuple = ()
    with_images: tuple = ()
    placed_by_tokens: bool = False
    image_embeddings: str | None = None
    embeddings: str | None = None
    grid_positions: str | None = None

    @property
    def of_upstream(self):
        """The inputs that upstream's backbone has, too, in its order."""
        return (
            *self.read_by_encoder,
            self.token_ids,
            self.padding_mask,
            *self.beside_text,
            *self.images_of_upstream,
        )

    @property
    def of_source(self):
        """The inputs of an encoder, or in its place. Empty without one."""
        if self.source is None:
            return ()
        return (*self.read_by_encoder, self.source)

    @property
    def read_by_encoder(self):
        """The inputs of an encoder. Empty without one."""
        if self.source is None:
            return ()
        return self.source_ids, self.source_mask, *self.beside_source

    @property
    def images_of_upstream(self):
        """The inputs of images that upstream's backbone has. Empty without."""
        if self.images is None:
            return ()
        beside = () if self.placed_by_tokens else self.beside_images
        return self.images, *beside

    @property
    def of_images(self):
        """The inputs of images, or in their place. Empty without any."""
        if self.images is None:
            return ()
        further = () if self.grid_positions is None else (self.grid_positions,)
        return (
            self.images,
            *self.beside_images,
            self.image_embeddings,
            self.embeddings,
            *further,
        )

    def has_images(self, inputs):
        """Whether there are images among inputs, or what they became."""
        if self.images is None:
            return False
        names = self.images, self.image_embeddings, self.embeddings
        return any(inputs.get(name) is not None for name in names)

    @property
    def of_prefill(self):
        """What a prefill takes beside the text."""
        return (*self.of_source, *self.of_images)


TEXT = Roles()
ENCODER_DECODER = Roles(
    token_ids="decoder_token_ids",
    padding_mask="decoder_padding_mask",
    source_ids="encoder_token_ids",
    source_mask="encoder_padding_mask",
    source="encoder_sequence",
)
