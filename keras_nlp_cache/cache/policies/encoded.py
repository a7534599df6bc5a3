"""Keys and values of what an encoder returned: written once, then read."""

import typing

from keras import ops

from keras_nlp_cache.cache import kept


class Encoded(typing.NamedTuple):
    """Keys or values of all that an encoder has read.

    Of no length, until it has read something.

    Args:
        stored: A tensor `(B, key_value_heads, S, head_dim)`, or an `Int8`. `S`
            is the length of what the encoder has read.
        mask: float32 tensor `(B, 1, 1, S)`, added to the logits. It hides
            padding. With the keys, so that who goes on with a text needs
            nothing that the encoder was given.
    """

    stored: typing.Any
    mask: typing.Any

    @classmethod
    def empty(cls, stored, zeros):
        """Before anything was read.

        Args:
            stored: Empty, `(B, key_value_heads, 0, head_dim)`.
            zeros: Function from a shape and a dtype to a tensor.
        """
        batch = ops.shape(kept.as_tensor(stored))[0]
        return cls(stored, zeros((batch, 1, 1, 0), "float32"))

    def read(self, x, mask):
        """Keeps what was read, in the place of all before it.

        Args:
            x: Tensor `(B, key_value_heads, S, head_dim)`.
            mask: float32 tensor `(B, 1, 1, S)`.
        """
        return Encoded(kept.as_stored(x, self.stored), mask)

    @property
    def length(self):
        """How long that is which the encoder has read."""
        return self.mask.shape[-1]

    # Tokens of the text take no place here.
    spare = None

    def can_go_back(self, filled, to):
        return True


def is_encoded(kept):
    """Whether something that is kept is of an encoder, and not of the text."""
    return isinstance(kept, Encoded)
