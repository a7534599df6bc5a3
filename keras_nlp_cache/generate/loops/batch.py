"""Generation for a batch of prompts, from the first token to the last."""

import contextlib

import numpy as np
from keras import ops

from keras_nlp_cache.generate.loops import sampling
from keras_nlp_cache.generate.loops import speculative
from keras_nlp_cache.generate.loops.answers import ended
from keras_nlp_cache.generate.loops.answers import padded
from keras_nlp_cache.generate.loops.answers import Request
from keras_nlp_cache.generate.loops.generation import on_host
from keras_nlp_cache.generate.loops.generation import slots_for
from keras_nlp_cache.generate.loops.places import Places
from keras_nlp_cache.generate.loops.places import run
from keras_nlp_cache.generate.options.options import Options

# How many tokens a draft model guesses at a time.
_GUESSES = 5


def generate_batch(lm, inputs, stop_token_ids, assistant=None):
    """Does what upstream's `generate_step()` does, in a loop of ours.

    Args:
        lm: A `CausalLM` whose sampler picks one token at a time.
        inputs: Dictionary of `token_ids` and `padding_mask`, both `(B, T)`, by
            the names that they have for the backbone, and of what else its
            prefill takes.
        stop_token_ids: Sequence of ints, or `None`.
        assistant: Optional `CausalLM` that guesses tokens.

    Returns:
        Dictionary of NumPy arrays `token_ids` and `padding_mask`, `(B, T)`, by
        the same names.
    """
    roles = lm.backbone.roles
    token_ids = np.array(ops.convert_to_numpy(inputs[roles.token_ids]))
    given = ops.convert_to_numpy(inputs[roles.padding_mask]).astype(bool)
    source = {
        name: ops.convert_to_numpy(inputs[name])
        for name in lm.source_names
        if inputs.get(name) is not None
    }
    limit = token_ids.shape[1]
    stops = () if stop_token_ids is None else stop_token_ids
    lengths = given.sum(axis=1)
    ends = lengths.copy()
    for row, text in _texts(
        lm, token_ids, given, stops, draft(lm, assistant), source
    ):
        token_ids[row, : len(text)], ends[row] = text, len(text)
    if stop_token_ids is None:
        ends[:] = limit
    return {
        roles.token_ids: token_ids,
        roles.padding_mask: np.arange(limit) < ends[:, None],
    }


def _texts(lm, token_ids, given, stops, guesser, source):
    """Yields each row with its text, as long as there is room for."""
    loop, lengths = lm.generation_loop, given.sum(axis=1)
    limit = token_ids.shape[1]
    in_places = len(set(lengths)) > 1 and lm.backbone.rows is None
    if guesser is None and not loop.in_step and in_places and not source:
        stream = sampling.streams(loop.sampler, range(len(lengths)))
        requests = [
            Request(i, token_ids[i, :length], limit, stream[i])
            for i, length in enumerate(lengths)
        ]
        slots = slots_for(limit, lm.backbone.max_positions)
        lm.backbone.check_cache_size(len(lengths), slots)
        places = Places(loop, len(lengths), slots, stops, Options())
        try:
            for answer in run(places, iter(requests)):
                yield answer.number, answer.token_ids
        finally:
            places.leave()
        return
    groups = [np.arange(len(lengths))]
    if guesser is not None and (loop.in_step or guesser.in_step):
        # What is accepted takes rows out of step.
        groups = np.arange(len(lengths))[:, None]
    elif loop.in_step:
        groups = [np.flatnonzero(lengths == x) for x in np.unique(lengths)]
    for rows in groups:
        generation = _generated(
            lm,
            token_ids[rows],
            given[rows],
            np.full(len(rows), limit),
            stops,
            guesser,
            guesses(lm),
            source={name: x[rows] for name, x in source.items()},
        )
        for row, text, last in zip(
            rows, generation.token_ids, generation.index
        ):
            yield row, text[: last + 1]


def draft(lm, assistant):
    """What guesses tokens, if there is an assistant."""
    if assistant is None:
        return None
    return speculative.Draft(assistant.generation_loop)


def guesses(lm):
    """How many tokens a draft model guesses at a time."""
    return getattr(lm.sampler, "num_speculative_tokens", _GUESSES)


def checked(lm, requests, stops, options, guesser, count, watch=None):
    """Answers a batch of requests, from their first token to their last.

    Args:
        lm: A `CausalLM`.
        requests: List of `Request`s.
        stops: Sequence of ints.
        options: `Options`.
        guesser: Optional `speculative.Draft` or `Lookup`.
        count: int. How many tokens to guess at a time.
        watch: Optional, as for `Places`.

    Returns:
        A list with the `Answer` of each.
    """
    source = requests[0].source
    if source is not None:
        source = {
            name: np.stack([x.source[name] for x in requests])
            for name in source
        }
    token_ids, given = padded([x.token_ids for x in requests])
    generation = _generated(
        lm,
        token_ids,
        given,
        np.array([x.limit for x in requests]),
        stops,
        guesser,
        count,
        options,
        np.stack([x.stream for x in requests]),
        source,
    )
    return [
        ended(generation, row, request, watch)
        for row, request in enumerate(requests)
    ]


def _generated(
    lm,
    token_ids,
    given,
    limit,
    stops,
    guesser=None,
    count=0,
    options=None,
    stream=None,
    source=None,
):
    """The `Generation` of prompts that have ended, of arrays."""
    loop = lm.generation_loop
    length, room = int(limit.max()), [lm.backbone.max_positions]
    if guesser is not None:
        room.append(guesser.max_positions)
    room = min((x for x in room if x is not None), default=None)
    if guesser is not None and (room is None or length + count <= room):
        length += count
    slots = slots_for(length, room)
    logprobs = options and options.return_logprobs
    preparing = contextlib.nullcontext()
    if guesser is None:
        preparing = loop.preparing(
            len(token_ids), slots, stops, options, logprobs
        )
    with preparing:
        generation = loop.prefill(
            token_ids,
            given,
            slots,
            stream=stream,
            logprobs=logprobs,
            source=source,
        )
    if guesser is None:
        generation = loop.decode(generation, limit, stops, options)
    else:
        guesser.start(token_ids, given, slots)
        generation = speculative.decode(
            loop, guesser, generation, count, limit, stops, options
        )
    loop.release(generation)
    return on_host(generation)
