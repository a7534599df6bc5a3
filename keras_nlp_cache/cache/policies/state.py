"""What a recurrent layer keeps: a state, and no token for itself.

Its memory does not grow with the text, and there is no going back: what a state
was, a few tokens ago, nobody knows.
"""

import typing

from keras import ops


class StateShapes(typing.NamedTuple):
    """What a layer keeps in place of keys and values.

    A layer may keep two tensors, one in the place of each. What it does not
    need has no size, `(0,)`.

    Args:
        key: Shape of the one, without the batch.
        value: Shape of the other one.
    """

    key: tuple
    value: tuple


class State(typing.NamedTuple):
    """A tensor that each token changes.

    Args:
        stored: float32 tensor `(B, ...)`. Whatever the dtype of a cache: a
            state takes little memory, and its errors would add up.
    """

    stored: typing.Any

    @classmethod
    def empty(cls, shape, zeros=ops.zeros):
        """What it is before any token, of some shape with its batch."""
        return cls(zeros(shape, "float32"))

    # Tokens take no places.
    spare = None

    def can_go_back(self, filled, to):
        # A text begins with no state, whatever it was before.
        return to in (0, filled)


def is_state(kept):
    """Whether something that is kept is a state, and no keys or values."""
    return isinstance(kept, State)
