"""Generation for a batch of prompts, from the first token to the last."""

import numpy as np
from keras import ops

from keras_nlp_cache.generate.loops import speculative
from keras_nlp_cache.generate.loops.generation import slots_for

# How many tokens a draft model guesses at a time.
_GUESSES = 5


def generate_batch(lm, inputs, stop_token_ids, assistant=None):
    """Does what upstream's `generate_step()` does, in a loop of ours.

    Args:
        lm: A `CausalLM` whose sampler picks one token at a time.
        inputs: Dictionary of `token_ids` and `padding_mask`, both `(B, T)`.
        stop_token_ids: Sequence of ints, or `None`.
        assistant: Optional `CausalLM` that guesses tokens.

    Returns:
        Dictionary of NumPy arrays `token_ids` and `padding_mask`, `(B, T)`.
    """
    token_ids = np.array(ops.convert_to_numpy(inputs["token_ids"]))
    given = ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
    limit = token_ids.shape[1]
    stops = () if stop_token_ids is None else stop_token_ids
    lengths = given.sum(axis=1)
    groups = [np.arange(len(given))]
    if lm.generation_loop.in_step:
        groups = [np.flatnonzero(lengths == x) for x in np.unique(lengths)]
    ends = lengths.copy()
    for rows in groups:
        tokens, last = _generate(
            lm, token_ids[rows], given[rows], limit, stops, assistant
        )
        for row, text, end in zip(rows, tokens, last + 1):
            token_ids[row, :end], ends[row] = text[:end], end
    if stop_token_ids is None:
        ends[:] = limit
    # What upstream's loop leaves there, or a text that ended.
    padding_mask = np.arange(limit) < ends[:, None]
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def _generate(lm, token_ids, given, limit, stops, assistant):
    """Token ids `(B, S)`, and the slot of each row's last one."""
    slots = _slots(lm, limit, assistant)
    loop = lm.generation_loop
    generation = loop.prefill(token_ids, given, slots)
    if assistant is None:
        generation = loop.decode(generation, limit, stops)
    else:
        draft = speculative.Draft(assistant.generation_loop)
        draft.start(token_ids, given, slots)
        generation = speculative.decode(
            loop,
            draft,
            generation,
            getattr(lm.sampler, "num_speculative_tokens", _GUESSES),
            np.full(len(given), limit),
            stops,
        )
    loop.release(generation)
    return (
        ops.convert_to_numpy(generation.token_ids),
        ops.convert_to_numpy(generation.index),
    )


def _slots(lm, length, assistant=None):
    """How many slots texts of some length take, guesses included."""
    models = [lm] if assistant is None else [lm, assistant]
    limits = [model.backbone.max_positions for model in models]
    limits = [limit for limit in limits if limit is not None]
    return slots_for(length, min(limits, default=None))
