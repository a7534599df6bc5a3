"""Generation on JAX: one compiled prefill, one compiled decode loop."""

import jax
import keras
from keras import ops

from keras_nlp_cache.loops.generation import CompiledLoop
from keras_nlp_cache.loops.generation import unfinished


class JaxLoop(CompiledLoop):
    """Generation whose loops are compiled by XLA.

    Weights are arguments, so that new ones are seen without compiling again.
    The cache is donated: XLA updates it in place, from step to step and from
    call to call.
    """

    def __init__(self, lm):
        super().__init__(lm)
        self._compiled_prefill = jax.jit(self._stateless_prefill)
        self._compiled_decode = jax.jit(
            self._stateless_decode, donate_argnames="generation"
        )

    @property
    def compilations(self):
        return (
            self._compiled_prefill._cache_size()
            + self._compiled_decode._cache_size()
        )

    def _prefill(self, token_ids, given, length):
        return self._compiled_prefill(self._weights(), token_ids, given, length)

    def _decode(self, generation, limit, stop_token_ids):
        seeds = self.lm.sampler.variables
        generation, values = self._compiled_decode(
            self._weights(),
            [x.value for x in seeds],
            generation,
            limit,
            stop_token_ids,
        )
        for variable, value in zip(seeds, values):
            variable.assign(value)
        return generation

    def _weights(self):
        return [x.value for x in self.variables]

    def _stateless_prefill(self, weights, token_ids, given, length):
        mapping = list(zip(self.variables, weights))
        with keras.StatelessScope(state_mapping=mapping):
            cache = self.lm.backbone.make_cache(*token_ids.shape)
            return self._fill(token_ids, given, length, cache)

    def _stateless_decode(
        self, weights, seeds, generation, limit, stop_token_ids
    ):
        variables = self.lm.sampler.variables
        weights = list(zip(self.variables, weights))

        def body(generation, seeds):
            mapping = weights + list(zip(variables, seeds))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                generation = self._step(
                    self._make_call(), generation, stop_token_ids
                )
                return generation, [
                    scope.get_current_value(x) for x in variables
                ]

        return ops.while_loop(
            lambda generation, _: unfinished(generation, limit),
            body,
            (generation, seeds),
        )
