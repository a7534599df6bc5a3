"""Generation on JAX: one compiled prefill, one compiled decode loop."""

import jax
import keras
import numpy as np
from keras import ops

from keras_nlp_cache import compile_cache
from keras_nlp_cache.generate.loops.compiled import CompiledLoop
from keras_nlp_cache.generate.loops.jax_layout import check_same
from keras_nlp_cache.generate.loops.jax_layout import new_tensor
from keras_nlp_cache.generate.loops.jax_layout import readable
from keras_nlp_cache.generate.loops.jax_layout import readable_generation
from keras_nlp_cache.generate.loops.jax_layout import sharded
from keras_nlp_cache.products.finding import find_weights
from keras_nlp_cache.products.multiplying import multiplying_with
from keras_nlp_cache.products.packing import packed_now


class JaxLoop(CompiledLoop):
    """Generation whose loops are compiled by XLA.

    Weights are arguments, so that new ones are seen without compiling again.
    The cache is donated: XLA updates it in place, from step to step and from
    call to call.
    """

    def __init__(self, lm):
        super().__init__(lm)
        self.own_products = find_weights(lm)
        compile_cache.for_jax()
        # Nothing reads the memory that comes in, which is there to be donated.
        self._compiled_prefill = jax.jit(
            self._stateless_prefill, donate_argnames="memory", keep_unused=True
        )
        self._compiled_prefill_more = jax.jit(
            self._stateless_prefill_more, donate_argnames="cache"
        )
        self._compiled_read_more_source = jax.jit(
            self._stateless_read_more_source, donate_argnames="cache"
        )
        self._compiled_put_row = jax.jit(
            self._sharded_put_row, donate_argnames="cache"
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
                self._compiled_read_more_source,
                self._compiled_put_row,
                self._compiled_decode,
                self._compiled_verify,
            )
        )

    def _prefill(self, token_ids, length, source):
        check_same((token_ids, length, source))
        cache = self.new_cache(*token_ids.shape)
        weights = self._weights(self.rows_of_chunk(token_ids))
        memory = [x for x in jax.tree.leaves(cache) if x.size]
        return self._compiled_prefill(
            weights, token_ids, length, memory, source
        )

    def _prefill_more(self, token_ids, length, cache, start):
        check_same((token_ids, length, start))
        weights = self._weights(self.rows_of_chunk(token_ids))
        return self._compiled_prefill_more(
            weights, token_ids, length, cache, start
        )

    def _read_more_source(self, token_ids, cache, source, start):
        check_same((token_ids, source, start))
        values = [x.value for x in self.variables]
        return self._compiled_read_more_source(
            values, token_ids, cache, source, start
        )

    def put_row(self, cache, row, row_cache):
        return self._compiled_put_row(cache, np.int32(row), row_cache)

    def _decode(self, *args):
        return self._sample(self._compiled_decode, 1, *args)

    def _verify(self, *args):
        *_, count, _ = args
        return self._sample(self._compiled_verify, count + 1, *args)

    def _sample(self, compiled, length, *args):
        """Calls a compiled function that draws random numbers."""
        generation, *rest = args
        if isinstance(generation.token_ids, np.ndarray):
            # From the host, and not from the step before.
            check_same((generation._replace(logprobs=(), cache=()), rest))
        seeds = self.sampler_variables
        weights = self._weights(len(generation.token_ids) * length)
        generation, values = compiled(weights, [x.value for x in seeds], *args)
        for variable, value in zip(seeds, values):
            variable.assign(value)
        return generation

    def _cache_like_a_prefill_s(self, batch, slots):
        return self.lm.backbone.make_cache(
            batch,
            slots,
            self.lm.cache_dtype,
            self.lm.cache_policy,
            zeros=jax.ShapeDtypeStruct,
        )

    def _prepare(self, generation, bounds, values, structure):
        # JAX finds what it has traced and compiled by what it is called with.
        self._compiled_decode.lower(
            self._weights(len(generation.token_ids)),
            [x.value for x in self.sampler_variables],
            generation,
            bounds,
            values,
            structure,
        ).compile()

    def restore_cache(self, arrays):
        # Not the arrays' own memory, which can't be donated.
        return sharded(
            jax.tree.map(lambda x: jax.numpy.array(x, copy=True), arrays)
        )

    def _new_tensor(self, shape, dtype):
        return new_tensor(shape, dtype)

    def _weights(self, rows):
        """The values of all variables, and what is packed for some rows."""
        values = [x.value for x in self.variables]
        return values, packed_now(self.own_products, rows)

    def _stateless_prefill(self, weights, token_ids, length, memory, source):
        del memory
        cache = sharded(self.empty_cache(*token_ids.shape))
        values, _ = weights
        mapping = list(zip(self.variables, values))
        with keras.StatelessScope(state_mapping=mapping):
            cache = self._read_source(token_ids, cache, source)
        start = self.lm.read_with(source)
        return self._stateless_prefill_more(
            weights, token_ids, length, cache, start
        )

    def _stateless_prefill_more(self, weights, token_ids, length, cache, start):
        values, packed = weights
        mapping = list(zip(self.variables, values))
        with (
            keras.StatelessScope(state_mapping=mapping),
            multiplying_with(self.own_products, packed),
        ):
            return sharded(self._fill(token_ids, length, cache, start))

    def _stateless_read_more_source(
        self, values, token_ids, cache, source, start
    ):
        mapping = list(zip(self.variables, values))
        with keras.StatelessScope(state_mapping=mapping):
            return sharded(
                super()._read_more_source(token_ids, cache, source, start)
            )

    def _sharded_put_row(self, cache, row, row_cache):
        return sharded(super().put_row(cache, row, row_cache))

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
        return readable_generation(generation), readable(seeds)

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
        generation, seeds = self._stateless(
            weights,
            seeds,
            lambda: super(JaxLoop, self)._verify(
                generation, drafted, bounds, values, count, structure
            ),
        )
        return readable_generation(generation), readable(seeds)

    def _stateless(self, weights, seeds, function):
        """What a function returns, and the state of the sampler after it."""
        variables, (values, packed) = self.sampler_variables, weights
        mapping = [*zip(self.variables, values), *zip(variables, seeds)]
        with (
            keras.StatelessScope(state_mapping=mapping) as scope,
            multiplying_with(self.own_products, packed),
        ):
            result = function()
            return result, [scope.get_current_value(x) for x in variables]
