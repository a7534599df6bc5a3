"""One compiled step of generation, for loops that run in Python.

`generate()` compiles its whole loop, which is fastest when all that counts is
the end. To look at each token as it comes, the loop has to be in Python, and
what is compiled is its body.
"""

import keras
from keras import ops

from keras_nlp_cache.cache import owned_cache


def compile_decode_step(lm):
    """Compiles the model and its sampler into one function.

    Args:
        lm: A `CausalLM` whose sampler picks one token at a time from a
            distribution (greedy, top-k, top-p, random, or a subclass of
            `keras_hub.samplers.Sampler` that defines `get_next_token`).

    Returns:
        A function `(token_ids, cache, index, last) -> (next_token, cache)`.
        `token_ids` is int32 `(B, T)`, `index` the slot of the first of them,
        and `last` the offset of the one to continue from. The cache passed in
        must not be used again. `next_token` is int32 `(B,)`.
    """

    def step(token_ids, cache, index, last):
        hidden_states, cache = lm.run_backbone(token_ids, cache, index)
        hidden_states = ops.take(hidden_states, last, axis=1)[:, None]
        logits = lm.backbone.token_embedding(hidden_states, reverse=True)
        probabilities = lm.sampler.compute_probabilities(logits[:, 0])
        next_token = lm.sampler.get_next_token(probabilities)
        return ops.cast(next_token, "int32"), cache

    compilers = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
    return compilers[keras.config.backend()](lm, step)


def _scalar(x):
    return ops.convert_to_tensor(x, dtype="int32")


def _jax(lm, step):
    if lm.run_eagerly:
        return step
    import jax

    def variables():
        return (
            *lm.sampler.variables,
            *lm.trainable_variables,
            *lm.non_trainable_variables,
        )

    def stateless_step(values, token_ids, cache, index, last):
        mapping = list(zip(variables(), values))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            next_token, cache = step(token_ids, cache, index, last)
        seeds = [scope.get_current_value(v) for v in lm.sampler.variables]
        return next_token, cache, seeds

    compiled = jax.jit(stateless_step, donate_argnames="cache")

    def run(token_ids, cache, index, last):
        next_token, cache, seeds = compiled(
            [v.value for v in variables()],
            token_ids,
            cache,
            _scalar(index),
            _scalar(last),
        )
        for variable, value in zip(lm.sampler.variables, seeds):
            if value is not None:
                variable.assign(value)
        return next_token, cache

    return run


def _tensorflow(lm, step):
    if lm.run_eagerly:
        return step
    import tensorflow as tf

    compiled = tf.function(step, jit_compile=lm.jit_compile)
    return lambda token_ids, cache, index, last: compiled(
        token_ids, cache, _scalar(index), _scalar(last)
    )


def _torch(lm, step):
    import torch

    def run(token_ids, cache, index, last):
        with torch.no_grad(), owned_cache():
            return step(token_ids, cache, index, _scalar(last))

    return run
