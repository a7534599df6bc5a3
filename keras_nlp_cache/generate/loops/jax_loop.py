"""Generation on JAX: one compiled prefill, one compiled decode loop."""

import jax
import keras
import numpy as np
from keras import ops

from keras_nlp_cache.generate.loops.compiled import CompiledLoop


def sharded(cache):
    """Lays a cache out over the devices of a `keras.distribution`.

    The batch is split along the distribution's batch axis, the key/value heads
    along the other one, each as far as it can be split evenly.

    Args:
        cache: Pairs of arrays `(B, heads, S, head_dim)`, or of what a policy
            keeps.

    Returns:
        The cache, as it is if there is no distribution.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return cache
    mesh, batch_axis = distribution.device_mesh, distribution.batch_dim_name
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    others = [name for name in mesh.axis_names if name != batch_axis]

    def shard(x):
        axes = [batch_axis, others[0] if others else None, None, None]
        axes = axes[: x.ndim]
        axes = [
            axis if axis is not None and size % sizes[axis] == 0 else None
            for axis, size in zip(axes, x.shape)
        ]
        layout = keras.distribution.TensorLayout(axes, mesh)
        return keras.distribution.distribute_tensor(x, layout)

    return jax.tree.map(shard, cache)


class JaxLoop(CompiledLoop):
    """Generation whose loops are compiled by XLA.

    Weights are arguments, so that new ones are seen without compiling again.
    The cache is donated: XLA updates it in place, from step to step and from
    call to call.
    """

    def __init__(self, lm):
        super().__init__(lm)
        # Nothing reads the cache that comes in, which is there to be donated.
        self._compiled_prefill = jax.jit(
            self._stateless_prefill, donate_argnames="cache", keep_unused=True
        )
        self._compiled_prefill_more = jax.jit(
            self._stateless_prefill_more, donate_argnames="cache"
        )
        self._compiled_put_row = jax.jit(
            super().put_row, donate_argnames="cache"
        )
        self._compiled_decode = jax.jit(
            self._stateless_decode,
            donate_argnames="generation",
            static_argnames="structure",
        )
        self._compiled_verify = jax.jit(
            self._stateless_verify,
            donate_argnames="generation",
            static_argnames=("count", "structure"),
        )

    @property
    def compilations(self):
        return sum(
            function._cache_size()
            for function in (
                self._compiled_prefill,
                self._compiled_prefill_more,
                self._compiled_put_row,
                self._compiled_decode,
                self._compiled_verify,
            )
        )

    def _prefill(self, token_ids, length):
        cache = self.new_cache(*token_ids.shape)
        return self._compiled_prefill(self._weights(), token_ids, length, cache)

    def _prefill_more(self, token_ids, length, cache, start):
        return self._compiled_prefill_more(
            self._weights(), token_ids, length, cache, start
        )

    def put_row(self, cache, row, row_cache):
        return self._compiled_put_row(cache, np.int32(row), row_cache)

    def _decode(self, *args):
        return self._sample(self._compiled_decode, *args)

    def _verify(self, *args):
        return self._sample(self._compiled_verify, *args)

    def _sample(self, compiled, *args):
        """Calls a compiled function that draws random numbers."""
        seeds = self.sampler_variables
        generation, values = compiled(
            self._weights(), [x.value for x in seeds], *args
        )
        for variable, value in zip(seeds, values):
            variable.assign(value)
        return generation

    def restore_cache(self, arrays):
        # Not the arrays' own memory, which can't be donated.
        return sharded(
            jax.tree.map(lambda x: jax.numpy.array(x, copy=True), arrays)
        )

    def _new_tensor(self, shape, dtype):
        # JAX would compile what makes zeros, for each shape.
        return sharded(
            jax.device_put(
                np.zeros(shape, jax.numpy.dtype(dtype)), may_alias=False
            )
        )

    def _weights(self):
        return [x.value for x in self.variables]

    def _stateless_prefill(self, weights, token_ids, length, cache):
        cache = sharded(jax.tree.map(jax.numpy.zeros_like, cache))
        return self._stateless_prefill_more(
            weights, token_ids, length, cache, 0
        )

    def _stateless_prefill_more(self, weights, token_ids, length, cache, start):
        mapping = list(zip(self.variables, weights))
        with keras.StatelessScope(state_mapping=mapping):
            return self._fill(token_ids, length, cache, start)

    def _stateless_decode(
        self, weights, seeds, generation, bounds, values, structure
    ):
        pick = self._picker(values, structure)

        def body(i, generation, seeds):
            generation, seeds = self._stateless(
                weights,
                seeds,
                lambda: self._step(self._make_call(), pick, generation, bounds),
            )
            return i + 1, generation, seeds

        _, generation, seeds = ops.while_loop(
            lambda i, generation, _: ops.logical_and(
                i < bounds.steps, self._unfinished(generation, bounds)
            ),
            body,
            (np.int32(0), generation, seeds),
        )
        return generation, seeds

    def _stateless_verify(
        self,
        weights,
        seeds,
        generation,
        drafted,
        bounds,
        values,
        count,
        structure,
    ):
        return self._stateless(
            weights,
            seeds,
            lambda: super(JaxLoop, self)._verify(
                generation, drafted, bounds, values, count, structure
            ),
        )

    def _stateless(self, weights, seeds, function):
        """What a function returns, and the state of the sampler after it."""
        variables = self.sampler_variables
        mapping = [*zip(self.variables, weights), *zip(variables, seeds)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            result = function()
            return result, [scope.get_current_value(x) for x in variables]
