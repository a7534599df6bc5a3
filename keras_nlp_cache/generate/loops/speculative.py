"""Decoding with guesses, for the model to check several at once.

The model reads several guesses in one pass, which costs little more than a
single token, and samples what it would say after each of them. Guesses are kept
as far as they are what it says, in each row for itself. So every token is the
model's own, whatever was guessed: greedy tokens are those of plain decoding,
and sampled ones have its distribution.
"""

import numpy as np
from keras import ops

from keras_nlp_cache.cache.kept import spare
from keras_nlp_cache.cache.slots import slots
from keras_nlp_cache.generate.loops.generation import on_host
from keras_nlp_cache.generate.loops.generation import with_logprobs


def verify_step(pick, call, generation, drafted, count, bounds):
    """Checks guesses, and adds those that are right and one token more.

    Args:
        pick: As for `decode_step()`.
        call: Function from a `Generation` to `(logits, cache)`, logits
            `(B, count + 1, vocabulary_size)` of what follows its last token
            and each guess.
        generation: A `Generation` with `count + 1` slots from the last token of
            each row that has not ended.
        drafted: int32 `(B, S)`, its token ids with guesses after them.
        count: int. How many guesses there are in each row.
        bounds: `Bounds`.

    Returns:
        The `Generation` with 1 to `count + 1` tokens more in each row that had
        not ended.
    """
    going = ops.logical_not(generation.ended(bounds.limit))
    drafted = generation._replace(token_ids=drafted)
    logits, cache = call(drafted)
    new = slots(generation.index + 1, count + 1)
    chosen, stream = pick(logits, drafted, new)

    inside = ops.minimum(new, ops.shape(drafted.token_ids)[1] - 1)
    guesses = ops.take_along_axis(drafted.token_ids, inside, axis=1)
    right = ops.cast(guesses == chosen, "int32")[:, :count]
    agreed = ops.sum(ops.cumprod(right, axis=1), axis=1, keepdims=True)
    stops = ops.any(chosen[:, :, None] == bounds.stops, axis=2)
    ends = ops.cast(stops, "int32")
    kept = ops.arange(count + 1)[None] <= agreed
    for condition in (
        ops.cumsum(ends, axis=1) - ends == 0,
        new < bounds.limit[:, None],
        going[:, None],
    ):
        kept = ops.logical_and(kept, condition)
    gained = ops.cast(ops.sum(ops.cast(kept, "int32"), axis=1), "int32")

    # Which of the new tokens belongs to each slot, if one does.
    everywhere = slots(0, ops.shape(drafted.token_ids)[1])
    which = everywhere - generation.index[:, None] - 1
    is_new = ops.logical_and(which >= 0, which < gained[:, None])
    which = ops.clip(which, 0, count)
    return generation._replace(
        token_ids=ops.where(
            is_new,
            ops.take_along_axis(chosen, which, axis=1),
            generation.token_ids,
        ),
        done=ops.logical_or(
            generation.done, ops.any(ops.logical_and(stops, kept), axis=1)
        ),
        index=generation.index + gained,
        stream=stream,
        logprobs=with_logprobs(
            generation.logprobs, logits, chosen, is_new, which
        ),
        cache=cache,
    )


class Draft:
    """A smaller model that guesses what the larger one will say.

    Args:
        loop: The `Loop` of the smaller model.

    Reference:
        Leviathan et al., 2022, https://arxiv.org/abs/2211.17192
    """

    def __init__(self, loop):
        self._loop, self._generation = loop, None
        self.max_positions = loop.lm.backbone.max_positions
        self.in_step = loop.in_step

    def start(self, prompts, given, slots):
        self._generation = self._loop.prefill(prompts, given, slots)

    def guess(self, generation, count, limit):
        """Guesses `count` tokens in every row that has not ended.

        Args:
            generation: A `Generation` of arrays.
            count: int.
            limit: int array `(B,)`. See `Bounds`.

        Returns:
            int32 `(B, S)`, token ids with guesses after them.
        """
        ended = ops.convert_to_numpy(generation.ended(limit))
        # One token more than it is asked for is computed, so that its cache
        # holds all guesses if all are right.
        until = np.where(ended, 0, generation.index + count + 2)
        until = np.minimum(until, generation.token_ids.shape[1])
        self._generation = self._loop.decode(
            self._generation._replace(
                token_ids=np.array(generation.token_ids),
                done=np.zeros_like(generation.done),
                index=np.array(generation.index),
            ),
            until,
        )
        return self._generation.token_ids

    def stop(self):
        self._loop.release(self._generation)


class Lookup:
    """Guesses that a text goes on as it did after the same tokens before.

    Args:
        longest: int. How many of the last tokens to look for, at first.

    Reference:
        https://github.com/apoorvumang/prompt-lookup-decoding
    """

    max_positions = None
    in_step = False

    def __init__(self, longest=2):
        self._longest = longest

    def start(self, prompts, given, slots):
        pass

    def guess(self, generation, count, limit):
        """As `Draft.guess()`. `None` if there is nothing to guess."""
        drafted, found = np.array(generation.token_ids), False
        for row, index in enumerate(generation.index):
            if generation.done[row] or index + 1 >= limit[row]:
                continue
            guesses = self._continuation(drafted[row, : index + 1], count)
            found = found or len(guesses) > 0
            drafted[row, index + 1 : index + 1 + len(guesses)] = guesses
        return drafted if found else None

    def _continuation(self, text, count):
        for size in range(min(self._longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text, size)
            places = np.flatnonzero((windows[:-1] == text[-size:]).all(axis=1))
            if len(places):
                after = places[-1] + size
                return text[after : after + count]
        return text[:0]

    def stop(self):
        pass


def decode(loop, guesser, generation, count, limit, stops=(), options=None):
    """Generates what `loop` would alone.

    Args:
        loop: The `Loop` of the model to generate with.
        guesser: A `Draft` or `Lookup` that has started with the same prompts.
        generation: A `Generation`, not to be used any more.
        count: int. How many tokens to guess at a time.
        limit: int array `(B,)`. How many tokens each row is to have.
        stops: Sequence of ints, as for `Loop.decode()`.
        options: Optional `Options`.

    Returns:
        A `Generation`.
    """
    count_of_slots = generation.token_ids.shape[1]
    most = spare(generation.cache)
    if most is not None and count + 1 >= most:
        raise ValueError(
            f"Expected to guess at most {most - 1} tokens at a time, which is "
            "how far a cache goes back in which later tokens take the places "
            f"of earlier ones. Received: {count}. Guess fewer, or compile with "
            "another `cache_policy`."
        )
    while True:
        now = on_host(generation)
        ended = np.asarray(ops.convert_to_numpy(now.ended(limit)))
        if ended.all():
            guesser.stop()
            return generation
        if now.index[~ended].max() + count + 2 > count_of_slots:
            # Too few slots are left to guess into.
            guesser.stop()
            return loop.decode(generation, limit, stops, options)
        drafted = guesser.guess(now, count, limit)
        if drafted is None:
            generation = loop.decode(generation, limit, stops, options, steps=1)
        else:
            generation = loop.verify(
                generation, drafted, count, limit, stops, options
            )
