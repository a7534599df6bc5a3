"""Decoding with a draft model, which guesses tokens for a larger one to check.

The larger model reads several guesses in one pass, which costs little more
than a single token, and samples what it would say after each of them. Guesses
are kept as far as they are what it says. So every token is the larger model's
own, whatever the draft is: greedy tokens are those of plain decoding, and
sampled ones have its distribution.
"""

import numpy as np
from keras import ops

from keras_nlp_cache.cache.slots import start_at


def verify_step(sampler, call, generation, drafted, count, limit, stops):
    """Checks guesses, and adds those that are right and one token more.

    Args:
        sampler: What picks tokens.
        call: Function from a `Generation` to `(logits, cache)`, logits
            `(B, count + 1, vocabulary_size)` of what follows its last token
            and each guess.
        generation: A `Generation` with `count + 2` slots from its last token.
        drafted: int32 `(B, S)`, its token ids with guesses after them.
        count: int. How many guesses there are.
        limit: int scalar. The number of tokens not to exceed.
        stops: int32 `(N,)`. A row is done once it has generated one of them.

    Returns:
        The `Generation` with 1 to `count + 1` tokens more.
    """
    token_ids, given, done, index, _ = generation
    batch = ops.shape(token_ids)[0]
    new = (batch, count + 1)
    logits, cache = call(generation._replace(token_ids=drafted))
    chosen = sampler.get_next_token(
        sampler.compute_probabilities(
            ops.reshape(logits, (batch * (count + 1), -1))
        )
    )
    first = index + 1
    known = ops.slice(token_ids, start_at(0, first), new)
    is_given = ops.slice(given, start_at(0, first), new)
    chosen = ops.where(
        is_given, known, ops.reshape(ops.cast(chosen, "int32"), new)
    )

    guesses = ops.slice(drafted, start_at(0, first), (batch, count))
    right = ops.logical_or(guesses == chosen[:, :count], done[:, None])
    agreed = ops.sum(ops.cumprod(ops.cast(right, "int32"), axis=1), axis=1)
    ends = ops.any(chosen[:, :, None] == stops[None, None], axis=2)
    ends = ops.logical_and(ends, ops.logical_not(is_given))
    done_at = ops.logical_or(
        ops.cumsum(ops.cast(ends, "int32"), axis=1) > 0, done[:, None]
    )
    going_on = ops.logical_not(ops.all(done_at, axis=0))
    # One length for all rows, as far as plain decoding would have gone.
    gained = ops.minimum(
        ops.min(agreed), ops.sum(ops.cast(going_on[:count], "int32"))
    )
    gained = ops.minimum(gained + 1, ops.cast(limit, "int32") - first)
    is_gained = ops.arange(count + 1) < gained
    return generation._replace(
        token_ids=ops.slice_update(
            token_ids, start_at(0, first), ops.where(is_gained, chosen, known)
        ),
        done=ops.logical_or(
            done, ops.any(ops.logical_and(ends, is_gained), axis=1)
        ),
        index=ops.cast(index + gained, "int32"),
        cache=cache,
    )


def decode(loop, draft_loop, prompts, given, slots, count, limit, stops=()):
    """Generates from prompts as `loop` would alone.

    Args:
        loop: The `Loop` of the model to generate with.
        draft_loop: The `Loop` of the model that guesses.
        prompts: int32 array `(B, T)`, as for `Loop.prefill()`.
        given: bool array `(B, T)`, as for `Loop.prefill()`.
        slots: int, as for `Loop.prefill()`.
        count: int. How many tokens to guess at a time.
        limit: int. The number of tokens to reach, prompts included.
        stops: Sequence of ints, as for `Loop.decode()`.

    Returns:
        A `Generation`.

    Reference:
        Leviathan et al., 2022, https://arxiv.org/abs/2211.17192
    """
    generation = loop.prefill(prompts, given, slots)
    draft = draft_loop.prefill(prompts, given, slots)
    while True:
        index = int(generation.index)
        done = ops.convert_to_numpy(generation.done)
        if index + 1 >= limit or done.all():
            return generation
        if index + count + 2 > slots:
            # Too few slots are left to guess into.
            return loop.decode(generation, limit, stops)
        # The draft computes one token more than it is asked for, so that its
        # cache holds all guesses if all are right. It gets copies, as loops
        # may use up what they are given.
        draft = draft_loop.decode(
            draft._replace(
                token_ids=_copy(generation.token_ids),
                done=ops.zeros(done.shape, "bool"),
                index=_copy(generation.index),
            ),
            min(index + count + 2, slots),
        )
        generation = loop.verify(
            generation, draft.token_ids, count, limit, stops
        )


def _copy(x):
    return ops.convert_to_tensor(np.array(ops.convert_to_numpy(x), copy=True))
