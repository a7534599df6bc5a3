"""What the inputs of a graph are for, whatever they are called."""

import types
import typing


class Medium(typing.NamedTuple):
    """Names of what stands for images, or for sound, beside a text.

    Args:
        kind: `"image"` or `"audio"`.
        given: What a tower of layers reads.
        beside: Names of what upstream's backbone takes with it. The last one
            has a column for each token of the text.
        with_given: Those of these that the tower takes, too.
        output: The output of the tower.
        tower: Name of the attribute that holds the tower.
        after_tower: Names of those that hold what then comes of it alone, the
            last of which returns what the text is joined with.
        join: Name of the attribute that holds the layer that joins it with the
            text, `None` if the first decoder block is called with what is
            joined.
        axes: Dictionary of what the axes of some of these are, by their names.
        one: What one of them is called, if not as its kind is.
    """

    kind: str
    given: str
    beside: tuple = ()
    with_given: tuple = ()
    output: str | None = None
    tower: str = "vision_encoder"
    after_tower: tuple = ()
    join: str | None = None
    axes: typing.Mapping = types.MappingProxyType({})
    one: str | None = None

    @property
    def noun(self):
        """What one of them is called."""
        return self.one or self.kind

    def is_in(self, inputs):
        """Whether there is some among inputs, or what a tower made of it."""
        names = self.given, self.output
        return any(inputs.get(name) is not None for name in names)


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
        media: `Medium`s, in the order in which they are joined with the text.
        placed_by_tokens: Whether upstream's backbone takes none of what is
            beside them, and has them where tokens have the id for it.
        embeddings: All of these and the embedded text, as one sequence.
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
    media: tuple = ()
    placed_by_tokens: bool = False
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
            *self.media_of_upstream,
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
    def media_of_upstream(self):
        """The inputs of media that upstream's backbone has. Empty without."""
        return tuple(
            name
            for x in self.media
            for name in (x.given, *(() if self.placed_by_tokens else x.beside))
        )

    @property
    def beside_media(self):
        """What there is beside media, whether upstream's backbone takes it."""
        return tuple(name for x in self.media for name in x.beside)

    @property
    def of_media(self):
        """The inputs of media, or in their place. Empty without any."""
        if not self.media:
            return ()
        further = () if self.grid_positions is None else (self.grid_positions,)
        return (
            *(y for x in self.media for y in (x.given, *x.beside, x.output)),
            self.embeddings,
            *further,
        )

    @property
    def masks(self):
        """Those that have a column for each token of the text."""
        return tuple(name for x in self.media for name in x.beside[-1:])

    def medium(self, kind):
        """The `Medium` of a kind, `None` if there is none."""
        return next((x for x in self.media if x.kind == kind), None)

    @property
    def images(self):
        """The `Medium` of images, one without names if there is none."""
        return self.medium("image") or Medium("image", None)

    def has_media(self, inputs):
        """Whether there are media among inputs, or what they became."""
        if self.media and inputs.get(self.embeddings) is not None:
            return True
        return any(x.is_in(inputs) for x in self.media)

    @property
    def of_prefill(self):
        """What a prefill takes beside the text."""
        return (*self.of_source, *self.of_media)


TEXT = Roles()
ENCODER_DECODER = Roles(
    token_ids="decoder_token_ids",
    padding_mask="decoder_padding_mask",
    source_ids="encoder_token_ids",
    source_mask="encoder_padding_mask",
    source="encoder_sequence",
)
