"""What of the options a decode loop is compiled for."""

import dataclasses
import types
import typing


class Same:
    """A callable that equals what is the same object, which it keeps alive.

    What a method is bound to makes no new one of it, as Python makes a new
    object whenever it is looked up.

    Args:
        function: Callable. It need be neither hashable nor comparable.
    """

    def __init__(self, function):
        self.function = function

    def _key(self):
        if isinstance(self.function, types.MethodType):
            return id(self.function.__self__), id(self.function.__func__)
        return (id(self.function),)

    def __eq__(self, other):
        return isinstance(other, Same) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())


@dataclasses.dataclass(frozen=True)
class Structure:
    """Which options are on, and in which shapes.

    Hashable. A loop that was compiled for one serves all that equal it,
    whatever their values are.

    Attributes:
        logit_bias: bool.
        repetition_penalty: bool.
        counts: bool. Whether there is a presence or a frequency penalty.
        bad_words: Optional tuple `(words, tokens)`, the shape of their array.
        logits_processor: Optional `Same`.
        min_p: bool.
        return_logprobs: Optional int.
    """

    logit_bias: bool = False
    repetition_penalty: bool = False
    counts: bool = False
    bad_words: typing.Any = None
    logits_processor: typing.Any = None
    min_p: bool = False
    return_logprobs: typing.Any = None

    @property
    def processes(self):
        """Whether `process()` changes anything."""
        return self != Structure(return_logprobs=self.return_logprobs)
