"""The first tokens and the last ones are kept, of a text without an end."""

import dataclasses
import typing

import numpy as np
from keras import ops

from keras_nlp_cache.cache import kept
from keras_nlp_cache.cache.policies import rotating
from keras_nlp_cache.cache.policies.policy import Policy
from keras_nlp_cache.cache.policies.rotating import latest
from keras_nlp_cache.cache.policies.rotating import put_in_turns
from keras_nlp_cache.cache.policies.rotating import Rotating
from keras_nlp_cache.cache.slots import is_per_row
from keras_nlp_cache.cache.slots import slots


@dataclasses.dataclass(frozen=True)
class SinksAndWindow(Policy):
    """Keeps the first tokens of a text and the last ones, in every layer.

    A text may then go on without an end, in memory that does not grow. Models
    attend much to the first tokens, whatever they say, and fail without them.
    To a query, the first tokens seem to stand right before the window, so that
    no distance is larger than those that the model was trained on. That takes
    rotary positions, or biases for distances. A text of at most `sinks +
    window` tokens is what it is with all tokens kept.

    Args:
        storage: See `Policy`.
        sinks: int. How many tokens to keep at the beginning.
        window: int. How many tokens a query sees besides, its own included.

    Reference:
        Xiao et al., 2023, https://arxiv.org/abs/2309.17453
    """

    sinks: int = 4
    window: int = 1020

    def __post_init__(self):
        super().__post_init__()
        for name in ("sinks", "window"):
            x = getattr(self, name)
            if not isinstance(x, int) or isinstance(x, bool) or x < 1:
                raise ValueError(
                    f"Expected `{name}` to be an integer of 1 or more. "
                    f"Received: {x!r}."
                )

    def check(self, backbone):
        if backbone.max_positions is not None:
            raise ValueError(
                "Expected a model with rotary positions or biases for "
                f"distances. Received: {backbone.name!r}, which learned "
                f"{backbone.max_positions} positions: a text that goes on "
                "without an end has others. Use another cache policy."
            )

    def make(self, shape, dtype, window, zeros=ops.zeros):
        batch, heads, max_length, head_dim = shape
        if window is not None and window <= self.window:
            # Nothing in such a layer ever sees the first tokens.
            return Rotating(self.storage).make(shape, dtype, window, zeros)
        places = self.sinks + self.window + rotating.SPARE
        if places >= max_length:
            return self.store(shape, dtype, zeros)
        return SinksAndRing(
            self.store((batch, heads, places, head_dim), dtype, zeros),
            zeros((batch, self.sinks, 0), "int32"),
        )


class SinksAndRing(typing.NamedTuple):
    """Places of the first tokens, and places that are taken in turns.

    Args:
        stored: A tensor `(B, heads, sinks + window + SPARE, head_dim)`, or an
            `Int8`.
        sinks: Tensor `(B, sinks, 0)`. Nothing but its shape is used.
    """

    stored: typing.Any
    sinks: typing.Any

    @property
    def count(self):
        """How many first tokens are kept."""
        return self.sinks.shape[1]

    @property
    def window(self):
        return kept.places(self.stored) - self.count - rotating.SPARE

    def update(self, x, index):
        length = x.shape[2]
        if length == 1:
            place = self._places(index, 1)[:, 0]
            place = place if is_per_row(index) else place[0]
            written = kept.write(self.stored, x, place)
            return self._replace(stored=written), written
        # The first tokens see some whose places the last ones take.
        read = kept.join(self.stored, x)
        first = min(self.count, length)
        written = kept.put(
            self.stored, x[:, :, :first], self._places(index, first)
        )
        written = put_in_turns(written, x, index, self.count)
        return self._replace(stored=written), read

    def read_slots(self, index, length):
        first, count = self.count, kept.places(self.stored)
        last = index + 1 if length == 1 else index
        # Of a place, the slot it has now. The first ones have theirs for good.
        turns = latest(slots(0, count) - first, last - first, count - first)
        turns = ops.where(turns < 0, -1, turns + first)
        place = ops.broadcast_to(slots(0, count), ops.shape(turns))
        read = ops.where(place < first, place, turns)
        read = ops.where(read < slots(last, 1), read, -1)
        if length == 1:
            return read
        return ops.concatenate([read, slots(index, length)], axis=1)

    def can_go_back(self, filled, to):
        return rotating.turns_back(
            self.count_in_turns, filled - self.count, to - self.count
        )

    @property
    def first_in_turns(self):
        return self.count

    @property
    def count_in_turns(self):
        return kept.places(self.stored) - self.count

    @property
    def spare(self):
        return rotating.SPARE // 2

    def needed(self, filled):
        """The slots that tokens from some slot on see, an int array."""
        slots = np.arange(filled)
        return slots[(slots < self.count) | (slots >= filled - self.window)]

    def sees(self, read, distance):
        """See `kept.sees()`."""
        is_first = read[:, None, :] < self.count
        return ops.logical_or(is_first, distance < self.window)

    def nearer(self, slot):
        """See `kept.nearer()`."""
        return ops.maximum(slot - (self.count + self.window - 1), 0)

    def _places(self, index, length):
        slot, first = slots(index, length), self.count
        turns = (slot - first) % (kept.places(self.stored) - first) + first
        return ops.where(slot < first, slot, turns)
