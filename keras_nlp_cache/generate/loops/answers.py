"""What generation is asked for, and what it answers."""

import typing

import numpy as np


class Request(typing.NamedTuple):
    """A prompt that waits for a place.

    Attributes:
        number: int. Says which answer is its own.
        token_ids: int32 array `(T,)`.
        limit: int. How many tokens the text is to have at most.
        stream: Array `(2,)` or `(0,)`. See `sampling.streams()`.
        source: Optional dictionary of arrays, what an encoder is to read, with
            no axis for a batch. Or what is read with a text in which images
            stand, as a batch of one.
    """

    number: int
    token_ids: typing.Any
    limit: int
    stream: typing.Any
    source: typing.Any = None


class Answer(typing.NamedTuple):
    """A text that has ended.

    Attributes:
        number: int, that of the request.
        token_ids: int32 array `(T,)`, the prompt and what was generated. If a
            stop token was, it is the last one.
        given: int. How many tokens the prompt has.
        finish_reason: `"stop"` or `"length"`.
        logprobs: See `Generation`, of what was generated. `()` if nobody asked.
    """

    number: int
    token_ids: typing.Any
    given: int
    finish_reason: str
    logprobs: typing.Any


def padded(rows):
    """Token ids of any lengths in one array, padded at their end.

    Args:
        rows: List of int arrays `(T,)`.

    Returns:
        `(token_ids, mask)`: int32 and bool arrays `(B, T)`, of the longest.
    """
    lengths = np.array([len(x) for x in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    token_ids = np.zeros(mask.shape, "int32")
    token_ids[mask] = np.concatenate(rows)
    return token_ids, mask


def ended(generation, row, request, watch=None):
    """The `Answer` to a request, `None` if its text goes on.

    Args:
        generation: A `Generation` of arrays.
        row: int. Which row of it.
        request: The `Request`.
        watch: Optional function `(number, token_ids, given)` that returns how
            many tokens of a text are to stay if it is to end there, or `None`.
    """
    length = int(generation.index[row]) + 1
    token_ids = generation.token_ids[row, :length].copy()
    given, end = len(request.token_ids), None
    if watch is not None:
        end = watch(request.number, token_ids, given)
    if end is None and not generation.done[row] and length < request.limit:
        return None
    by_stop = end is not None or generation.done[row]
    end = length if end is None else end
    return Answer(
        request.number,
        token_ids[:end],
        given,
        "stop" if by_stop else "length",
        tuple(x[row, given:end].copy() for x in generation.logprobs),
    )
