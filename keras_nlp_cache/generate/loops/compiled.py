"""What loops that are compiled as a whole have in common."""

import contextlib
import functools

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.cache.kept import spare
from keras_nlp_cache.cache.slots import slots as slots_from
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.device import constants
from keras_nlp_cache.garbage import collecting_none
from keras_nlp_cache.generate.loops import sampling
from keras_nlp_cache.generate.loops.generation import Loop
from keras_nlp_cache.generate.loops.meanwhile import meanwhile
from keras_nlp_cache.generate.loops.spare_caches import SpareCaches
from keras_nlp_cache.generate.loops.tracing import tracing_once


class CompiledLoop(Loop):
    """A loop whose prefill and decode steps are a function each.

    One cache of several rows that is done with is kept for the next prefill,
    and one of a single row. The memory of another would often be new:
    TensorFlow gives that of variables back when XLA runs the next time, and on
    JAX what lies between is too small to use again.
    """

    compiles_sampler = True
    reads_together = False
    # Whether decode steps are traced after a prefill, and not at once with it.
    traces_in_turn = False

    def __init__(self, lm):
        super().__init__(lm)
        self.chunk = constants().compiled_chunk
        self._spare_caches = SpareCaches()
        self._prepared = set()
        # Streams are passed on from step to step.
        self.sampler_variables = []
        if not sampling.has_streams(self.sampler):
            self.sampler_variables = sampling.sampler_variables(self.sampler)

    def preparing(
        self, batch, slots, stop_token_ids=(), options=None, logprobs=None
    ):
        values, structure = self._options(options)
        bounds = self._bounds(batch, slots, stop_token_ids)
        shapes = tuple(np.shape(x) for x in tree.flatten((bounds, values)))
        key = batch, slots, logprobs, structure, shapes
        if key in self._prepared or not self._can_prepare():
            return contextlib.nullcontext()
        self.lm.backbone.check_cache_size(batch, slots)
        self._prepared.add(key)
        nothing = np.zeros((batch, 0), "int32")
        generation = self.start(
            nothing,
            np.ones(batch, "int32"),
            slots,
            self._cache_like_a_prefill_s(batch, slots),
            logprobs=logprobs,
        )
        return self._preparing(generation, bounds, values, structure)

    @contextlib.contextmanager
    def _preparing(self, *args):
        prepare = functools.partial(self._prepare, *args)
        with collecting_none(), meanwhile(prepare, waits=self.traces_in_turn):
            yield

    def keep(self, cache):
        self._spare_caches.put(cache)

    def rows_of_chunk(self, token_ids):
        """How many tokens a chunk of a prefill has, in all rows."""
        batch, slots = token_ids.shape
        return batch * min(self.chunk, slots)

    def new_cache(self, batch, slots):
        make_cache = functools.partial(self._make_cache, batch, slots)
        # Of another size, it goes before there are two.
        spare = self._spare_caches.take(batch, make_cache)[0]
        return spare or make_cache(zeros=self._new_tensor)

    def _chunk_of_prefill(self, slots):
        cache = self._make_cache(1, slots, zeros=keras.KerasTensor)
        return self._chunk_for(cache, slots)

    def _chunk_for(self, cache, slots):
        """How many tokens a prefill reads at a time."""
        chunk = min(self.chunk, slots)
        # What it writes past the prompt takes no place that is needed.
        return min(chunk, spare(cache) or chunk)

    def _fill(self, token_ids, length, cache, start=0):
        """Prefills, to be compiled: `length` and `start` may be tensors."""
        if self.lm.backbone.has_states:
            return self._fill_states(token_ids, length, cache, start)
        batch, slots = ops.shape(token_ids)
        chunk = self._chunk_for(cache, slots)

        def body(i, cache):
            # The last chunk may overlap the one before, and writes the same.
            # What it writes past the prompt is written again before it is read.
            at = ops.minimum(start + i * chunk, slots - chunk)
            tokens = ops.slice(token_ids, start_at(0, at), (batch, chunk))
            with tracing_once():
                return self.lm.read(tokens, cache, at)[1]

        with accessing(self.access):
            return ops.fori_loop(
                0, (length - 1 - start + chunk - 1) // chunk, body, cache
            )

    def _fill_states(self, token_ids, length, cache, start):
        """Prefills what no token may be read into twice.

        What follows the prompt in its last chunk is padding. Where a chunk
        would overlap the one before, tokens are read one by one.
        """
        batch, slots = ops.shape(token_ids)
        chunk, last = min(self.chunk, slots), length - 1
        mask = ops.cast(slots_from(0, slots) < last, "int32")
        mask = ops.broadcast_to(mask, (batch, slots))
        fitting = ops.minimum(
            (last - start + chunk - 1) // chunk, (slots - start) // chunk
        )

        def read(at, count, cache):
            tokens = ops.slice(token_ids, start_at(0, at), (batch, count))
            with tracing_once():
                return self.lm.read(tokens, cache, at, padding_mask=mask)[1]

        with accessing(self.access):
            cache = ops.fori_loop(
                0,
                fitting,
                lambda i, cache: read(start + i * chunk, chunk, cache),
                cache,
            )
            return ops.fori_loop(
                start + fitting * chunk,
                last,
                lambda at, cache: read(at, 1, cache),
                cache,
            )

    def _step(self, *args):
        with tracing_once():
            return super()._step(*args)

    def _verify(self, *args):
        with tracing_once():
            return super()._verify(*args)

    def _new_tensor(self, shape, dtype):
        """Memory for a part of a cache, with anything in it."""
        raise NotImplementedError

    def _can_prepare(self):
        """Whether a thread of its own would compile what this one runs."""
        # The cache of what an encoder reads has its length, not yet known.
        if self.lm.backbone.roles.of_source:
            return False
        # Keras keeps it for each thread.
        return keras.distribution.distribution() is None

    def _cache_like_a_prefill_s(self, batch, slots):
        """What stands for a cache where decode steps are prepared."""
        raise NotImplementedError

    def _prepare(self, generation, bounds, values, structure):
        """Compiles what `_decode()` of such arguments calls."""
        raise NotImplementedError
