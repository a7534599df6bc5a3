"""Which token comes next: the sampler's part of a decode step.

What samplers of keras_hub draw for one row depends on how many rows there are.
Here each row has a *stream* of random numbers of its own, and draws what it
would draw alone. The text of the first prompt is the one that upstream would
generate from that prompt alone, with the sampler as it is; the text of the
`n`th one is what it would generate with another seed, see `streams()`.
"""

import keras
import numpy as np
from keras import ops
from keras_hub.samplers import GreedySampler
from keras_hub.samplers import Sampler
from keras_hub.samplers import SpeculativeSampler

# Odd, and far from small numbers: seeds of neighbors have nothing in common.
_STRIDE = 0x9E3779B1


def token_sampler(sampler):
    """What picks the tokens: of a `SpeculativeSampler`, the one it wraps."""
    if isinstance(sampler, SpeculativeSampler):
        return sampler.base_sampler or GreedySampler()
    return sampler


def supports(sampler):
    """Whether a sampler picks one token at a time from a distribution.

    Greedy, top-k, top-p, random, and all that define `get_next_token()` alone.
    Those with a loop of their own (beam, contrastive) run it.
    """
    sampler = token_sampler(sampler)
    return (
        isinstance(sampler, Sampler)
        and type(sampler).__call__ is Sampler.__call__
        and type(sampler).run_loop is Sampler.run_loop
    )


def sampler_variables(sampler):
    """The seeds of a sampler, and what one of a user's keeps in variables."""
    kept = [x for x in vars(sampler).values() if isinstance(x, keras.Variable)]
    return [*sampler.variables, *kept]


def check_sampler(lm):
    """Refuses samplers with a loop of their own, which `generate()` runs.

    Raises:
        ValueError: If `supports(lm.sampler)` is false.
    """
    if not supports(lm.sampler):
        raise ValueError(
            "Expected a sampler that picks one token at a time, such as "
            f'"greedy" or "top_p". Received: {type(lm.sampler).__name__}, '
            "which has a loop of its own. Call `compile(sampler=...)` with "
            "another, or `generate()`."
        )


def check_loop(lm):
    """Refuses models that the loops would not generate as their users say.

    Raises:
        ValueError: If the sampler has a loop of its own, or a method that says
            how to generate was overridden, which `generate()` calls.
    """
    check_sampler(lm)
    overridden = lm.overridden(
        "generate_step", "_build_cache", "make_generate_function"
    )
    if overridden:
        raise ValueError(
            "Expected a model that generates as this package does, token by "
            f"token. Received: a {type(lm).__name__} with a "
            f"`{overridden[0]}` of its own, which `stream()`, sessions and "
            "`assistant_model` would pass by. Call `generate()`, or override "
            "`call_with_cache()` or the sampler."
        )


def has_streams(sampler):
    """Whether rows can draw from streams of their own.

    All that changes in the sampler is then its seed generator. Samplers that
    draw nothing, or that keep something else, pick tokens for all rows at once.
    """
    generator = getattr(sampler, "seed_generator", None)
    if not isinstance(generator, keras.random.SeedGenerator):
        return False
    variables = sampler_variables(sampler)
    return len(variables) == 1 and variables[0] is generator.state


def seed_of(sampler):
    """The seed that a sampler was made with, `None` if it has no streams."""
    if not has_streams(sampler):
        return None
    seed, _ = ops.convert_to_numpy(sampler.seed_generator.state.value)
    return int(seed)


def streams(sampler, numbers, seed=None):
    """Where the streams of some prompts begin.

    Args:
        sampler: A sampler.
        numbers: Sequence of ints. Which texts of a call these are, from 0.
        seed: Optional int. What the sampler would be made with. Defaults to
            where it is.

    Returns:
        Array `(B, 2)`, a state of the sampler's seed generator for each: its
        seed, another one for each number, and how much was drawn before. `(B,
        0)` if the sampler has no streams.
    """
    if not has_streams(sampler):
        return np.zeros((len(numbers), 0), "int32")
    state = sampler.seed_generator.state
    drawn = 0
    if seed is None:
        seed, drawn = (int(x) for x in ops.convert_to_numpy(state.value))
    found = [(seed + number * _STRIDE, drawn) for number in numbers]
    # Seeds are 32 bits, which some backends call signed.
    return np.asarray(found, "int64").astype("uint32").astype(state.dtype)


def advance(sampler, drawn):
    """Moves the sampler on, for the next call to draw something else.

    Args:
        sampler: A sampler.
        drawn: int. How much was drawn from the stream that went furthest, the
            second number in it.
    """
    if has_streams(sampler):
        state = sampler.seed_generator.state
        now = np.array(ops.convert_to_numpy(state.value))
        now[1] = max(now[1], drawn)
        state.assign(now)


def pick(sampler, logits, stream):
    """Picks a token in every row.

    Args:
        sampler: A sampler.
        logits: Tensor `(B, N, vocabulary_size)`, of `N` tokens in each row.
        stream: Tensor `(B, 2)` or `(B, 0)`.

    Returns:
        `(tokens, stream)`: int32 `(B, N)`, and the streams from there on.
    """
    batch, count, size = ops.shape(logits)

    def tokens_of(logits):
        probabilities = sampler.compute_probabilities(logits)
        return ops.cast(sampler.get_next_token(probabilities), "int32")

    if stream.shape[1] == 0:
        tokens = tokens_of(ops.reshape(logits, (batch * count, size)))
        return ops.reshape(tokens, (batch, count)), stream
    state = sampler.seed_generator.state

    def row(logits, stream):
        with keras.StatelessScope(state_mapping=[(state, stream)]) as scope:
            tokens = tokens_of(logits)
            return tokens, scope.get_current_value(state)

    if batch == 1:
        tokens, after = row(logits[0], stream[0])
        return tokens[None], after[None]
    if keras.config.backend() == "jax":
        return ops.vectorized_map(lambda x: row(*x), (logits, stream))
    if keras.config.backend() == "tensorflow":
        return ops.map(lambda x: row(*x), (logits, stream))
    rows = [row(logits[i], stream[i]) for i in range(batch)]
    return tuple(ops.stack(x) for x in zip(*rows))
