"""Where a layer has a window, a token takes the place of one that left it."""

import dataclasses
import typing

import numpy as np
from keras import ops

from keras_nlp_cache.cache import kept
from keras_nlp_cache.cache.policies.policy import Policy
from keras_nlp_cache.cache.slots import slots

# How many places there are beyond a window. As many tokens may be written that
# are then not part of the text without one in the window being lost. Half of
# them are for padding at the end of a chunk and for wrong guesses, the others
# for going back.
SPARE = 128


@dataclasses.dataclass(frozen=True)
class Rotating(Policy):
    """Keeps of layers with a window as many tokens as that, and some more.

    Their memory does not grow with the text. Other layers keep every token.

    Args:
        storage: See `Policy`.

    Reference:
        Mistral 7B, https://arxiv.org/abs/2310.06825
    """

    def make(self, shape, dtype, window, zeros=ops.zeros):
        batch, heads, max_length, head_dim = shape
        if window is None or window + SPARE >= max_length:
            return self.store(shape, dtype, zeros)
        shape = batch, heads, window + SPARE, head_dim
        return Ring(self.store(shape, dtype, zeros))


class Ring(typing.NamedTuple):
    """Places that are taken in turns.

    Args:
        stored: A tensor `(B, heads, window + SPARE, head_dim)`, or an `Int8`.
    """

    stored: typing.Any

    def update(self, x, index):
        if x.shape[2] == 1:
            place = ops.cast(index, "int32") % kept.places(self.stored)
            written = kept.write(self.stored, x, place)
            return Ring(written), written
        # The first tokens see some whose places the last ones take.
        read = kept.join(self.stored, x)
        return Ring(put_in_turns(self.stored, x, index)), read

    def read_slots(self, index, length):
        count = kept.places(self.stored)
        if length == 1:
            return latest(slots(0, count), index + 1, count)
        before = latest(slots(0, count), index, count)
        return ops.concatenate([before, slots(index, length)], axis=1)

    def can_go_back(self, filled, to):
        return turns_back(self.count_in_turns, filled, to)

    # The first slot whose place others may take, and how many places that is.
    first_in_turns = 0

    @property
    def count_in_turns(self):
        return kept.places(self.stored)

    @property
    def spare(self):
        return SPARE // 2

    def needed(self, filled):
        """The slots that tokens from some slot on see, an int array."""
        window = self.count_in_turns - SPARE
        return np.arange(max(0, filled - window), filled)


def turns_back(count, filled, to):
    """Whether nothing is lost of what tokens see after some slot.

    Args:
        count: int. How many places are taken in turns.
        filled: int. How many slots were ever written.
        to: int. From which slot on the text is to go on.
    """
    return filled + SPARE // 2 <= count or filled - to <= SPARE // 2


def put_in_turns(stored, x, index, first=0):
    """Stores tokens in places that are taken in turns.

    Args:
        stored: What is stored up to now.
        x: Tensor `(B, heads, T, head_dim)`.
        index: int, `()` or `(B,)`. The slot of the first token.
        first: int. The first place that is taken in turns.
    """
    count = kept.places(stored) - first
    length = x.shape[2]
    # Of more tokens than there are places, the last ones stay.
    skipped = max(0, length - count)
    where = slots(index + skipped - first, length - skipped) % count + first
    return kept.put(stored, x[:, :, skipped:], where)


def latest(place, index, count):
    """The last slot before some slot that had a place, negative if none had.

    Args:
        place: int32 `(1, N)`, places that are taken in turns.
        index: int32, `()` or `(B,)`. The slot.
        count: int. How many places there are.
    """
    last = slots(index, 1) - 1
    return last - (last - place) % count
