"""Answers requests, of which few are looked at ahead."""

import collections
import itertools

import numpy as np

from keras_nlp_cache.generate.loops.batch import checked
from keras_nlp_cache.generate.loops.generation import slots_for
from keras_nlp_cache.generate.loops.places import Places
from keras_nlp_cache.generate.loops.places import run

# The fewest tokens that an encoder reads, padding included.
_FEWEST = 16


class _Queue:
    """Requests that can be looked at before they are taken."""

    def __init__(self, requests):
        self._requests, self._seen = iter(requests), collections.deque()

    def look(self, count):
        """The next requests, as many as there are up to some number."""
        missing = count - len(self._seen)
        self._seen.extend(itertools.islice(self._requests, max(missing, 0)))
        return list(itertools.islice(self._seen, count))

    def take(self, count):
        """Yields the next requests, as many as there are up to some number."""
        while count and self.look(1):
            yield self._seen.popleft()
            count -= 1

    def up_to(self, limit):
        """Yields requests until one wants more tokens than that."""
        while self.look(1) and self._seen[0].limit <= limit:
            yield self._seen.popleft()


def answers(lm, requests, batch, stops, options, watch=None, most=1):
    """Answers requests, some at a time.

    Args:
        lm: A `CausalLM`.
        requests: Iterable of `Request`s.
        batch: int. How many to answer at a time.
        stops: Sequence of ints.
        options: `Options`.
        watch: Optional, as for `Places`.
        most: int. How many tokens a text may have, as far as that is known.

    Yields:
        The `Answer` of each, in the order in which they end.
    """
    loop, queue = lm.generation_loop, _Queue(requests)
    if loop.in_step:
        batch = 1
    while waiting := queue.look(batch):
        # Later ones may want more slots. Then all that are under way end first.
        most = max(most, *(x.limit for x in waiting))
        slots = slots_for(most, lm.backbone.max_positions)
        places = Places(loop, batch, slots, stops, options, watch)
        try:
            yield from run(places, queue.up_to(slots))
        finally:
            places.leave()


def checked_answers(
    lm, requests, batch, stops, options, guesser, count, watch=None
):
    """Answers requests with guesses, some at a time.

    Args:
        lm: A `CausalLM`.
        requests: Iterable of `Request`s.
        batch: int. How many to answer at a time.
        stops: Sequence of ints.
        options: `Options`.
        guesser: A `speculative.Draft` or `Lookup`.
        count: int. How many tokens to guess at a time.
        watch: Optional, as for `Places`.

    Yields:
        The `Answer` of each.
    """
    if lm.generation_loop.in_step or guesser.in_step:
        batch = 1
    queue = _Queue(requests)
    while waiting := list(queue.take(batch)):
        if any(x.source is not None for x in waiting):
            raise ValueError(
                "Expected prompts without images where tokens are guessed, by "
                "an `assistant_model` or by `prompt_lookup_num_tokens`, which "
                "see none. Received some with them."
            )
        yield from checked(lm, waiting, stops, options, guesser, count, watch)


def answers_after_source(
    lm, requests, batch, stops, options, guesser, count, watch=None
):
    """Answers requests of a model with an encoder, some at a time.

    What an encoder reads for them is read together.

    Takes the arguments of `checked_answers()`. There may be no guesser.
    """
    if lm.generation_loop.in_step or (guesser is not None and guesser.in_step):
        batch = 1
    queue = _Queue(requests)
    while waiting := list(queue.take(batch)):
        together = {}
        for request in padded_sources(waiting, lm.backbone.roles):
            shapes = tuple(x.shape for x in request.source.values())
            together.setdefault(shapes, []).append(request)
        for some in together.values():
            yield from checked(lm, some, stops, options, guesser, count, watch)


def padded_sources(requests, roles):
    """Requests with as much padding of what an encoder reads, if that is text.

    Of sound, an encoder may hear padding, too.

    Args:
        requests: List of `Request`s.
        roles: `Roles`.
    """
    lengths = [len(x.source[roles.source_mask]) for x in requests]
    if requests[0].source[roles.source_ids].ndim > 1:
        return requests
    # Of few sizes, for few to be compiled.
    length = max(_FEWEST, 1 << (max(lengths) - 1).bit_length())
    return [
        x._replace(
            source={
                name: y
                if name in roles.beside_source
                else np.pad(y, (0, length - len(y)))
                for name, y in x.source.items()
            }
        )
        for x in requests
    ]
