"""What the inputs of a graph are for, whatever they are called."""

import typing


class Roles(typing.NamedTuple):
    """Names of the inputs of a backbone, by what they are for.

    Args:
        token_ids: The text that is generated.
        padding_mask: Which of its slots are padding.
        source_ids: What an encoder reads, `None` without an encoder.
        source_mask: Which of that is padding.
        source: The output of the encoder. Given, the encoder does not run.
    """

    token_ids: str = "token_ids"
    padding_mask: str = "padding_mask"
    source_ids: str | None = None
    source_mask: str | None = None
    source: str | None = None

    @property
    def of_upstream(self):
        """The inputs that upstream's backbone has, too, in its order."""
        return (*self.of_source[:2], self.token_ids, self.padding_mask)

    @property
    def of_source(self):
        """The inputs of an encoder, or in its place. Empty without one."""
        if self.source is None:
            return ()
        return self.source_ids, self.source_mask, self.source


TEXT = Roles()
ENCODER_DECODER = Roles(
    token_ids="decoder_token_ids",
    padding_mask="decoder_padding_mask",
    source_ids="encoder_token_ids",
    source_mask="encoder_padding_mask",
    source="encoder_sequence",
)
