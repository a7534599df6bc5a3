"""The loop that generates tokens, as fast as each backend can run it.

`generation.py` says what is done: a prompt is *prefilled* into a cache, then
*decode steps* add one token each. One module per backend says how it is
compiled. All share one interface, `Loop`.
"""

import contextlib

import keras

from keras_nlp_cache.generate.loops.generation import Loop
from keras_nlp_cache.generate.loops.sampling import check_sampler


def make_loop(lm):
    """Makes the loop for a model, its sampler and the backend.

    Args:
        lm: A `CausalLM`, compiled. Its `run_eagerly` and its `jit_compile` are
            respected.

    Returns:
        A `Loop`.

    Raises:
        ValueError: If the sampler has a loop of its own.
    """
    check_sampler(lm)
    backend = keras.config.backend()
    if backend == "torch":
        from keras_nlp_cache.generate.loops import torch_loop

        # There, upstream calls in each step what a user may have overridden.
        if lm.run_eagerly or lm.overridden("call_with_cache"):
            return torch_loop.EagerTorchLoop(lm)
        return torch_loop.TorchLoop(lm)
    if lm.run_eagerly:
        return Loop(lm)
    if backend == "jax":
        from keras_nlp_cache.generate.loops.jax_loop import JaxLoop

        return JaxLoop(lm)
    if backend == "tensorflow":
        from keras_nlp_cache.generate.loops.tensorflow_loop import (
            TensorFlowLoop,
        )

        return TensorFlowLoop(lm)
    return Loop(lm)


def outside_of_strategies():
    """A scope with no `tf.distribute.Strategy` around, on any backend."""
    if keras.config.backend() != "tensorflow":
        return contextlib.nullcontext()
    from keras_nlp_cache.generate.loops import tensorflow_loop

    return tensorflow_loop.outside_of_strategies()
