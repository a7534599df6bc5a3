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
    token_ids = ops.convert_to_numpy(inputs["token_ids"])
    given = ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
    length = token_ids.shape[1]
    models = [lm] if assistant is None else [lm, assistant]
    limits = [model.backbone.max_positions for model in models]
    limits = [limit for limit in limits if limit is not None]
    slots = slots_for(length, min(limits, default=None))
    stops = () if stop_token_ids is None else stop_token_ids
    loop = lm.generation_loop
    if assistant is None:
        generation = loop.prefill(token_ids, given, slots)
        generation = loop.decode(generation, length, stops)
    else:
        generation = speculative.decode(
            loop,
            assistant.generation_loop,
            token_ids,
            given,
            slots,
            getattr(lm.sampler, "num_speculative_tokens", _GUESSES),
            length,
            stops,
        )
    token_ids = ops.convert_to_numpy(generation.token_ids)[:, :length]
    loop.release(generation)
    if stop_token_ids is None:
        padding_mask = np.ones_like(given)
    else:
        ends = np.isin(token_ids, stop_token_ids) & ~given
        # True up to the first end, and there.
        padding_mask = np.cumsum(ends, axis=1) - ends == 0
    return {"token_ids": token_ids, "padding_mask": padding_mask}
