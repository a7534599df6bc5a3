"""Generation on TensorFlow: one compiled prefill, one compiled decode loop."""

import contextlib
import ctypes
import platform
import weakref

import numpy as np
import tensorflow as tf
from keras import ops
from keras import tree

from keras_nlp_cache.generate.loops.compiled import CompiledLoop
from keras_nlp_cache.generate.loops.meanwhile import is_waiting
from keras_nlp_cache.generate.loops.meanwhile import proceed
from keras_nlp_cache.generate.loops.sampling import sampler_variables
from keras_nlp_cache.generate.loops.tensorflow_products import (
    kernels_as_matrices,
)
from keras_nlp_cache.generate.loops.tensorflow_products import using_matrices
from keras_nlp_cache.products.finding import find_weights
from keras_nlp_cache.products.multiplying import multiplying_with
from keras_nlp_cache.products.packing import packed_now


class TensorFlowLoop(CompiledLoop):
    """Generation whose loops are one `tf.function` each.

    Attributes:
        jit_compile_by_default: bool. What `jit_compile="auto"` means.

    Compiled by XLA unless the model was compiled with `jit_compile=False`.
    Keras' `"auto"` leaves XLA off on a CPU, where it is several times as fast
    for this.

    Between the two functions a cache lies in variables, which XLA updates in
    place. What is passed as a tensor, it copies.

    In the scope of a `tf.distribute.Strategy`, all of this is on one device.
    """

    jit_compile_by_default = True
    # What is compiled is found again by its name, in which TensorFlow counts
    # what was traced before it.
    traces_in_turn = True

    def __init__(self, lm):
        super().__init__(lm)
        jit_compile = lm.generation_jit_compile
        if jit_compile == "auto":
            jit_compile = self.jit_compile_by_default
        if any(map(_is_on_several_devices, sampler_variables(self.sampler))):
            # XLA would have to write to all of them, and writes to its own.
            jit_compile = False
        self.own_products = None
        if jit_compile and not any(map(_is_on_several_devices, lm.variables)):
            self.own_products = find_weights(lm)
        options = {"autograph": False, "jit_compile": bool(jit_compile)}
        self._compiled_prefill = tf.function(self._prefill_into, **options)
        self._compiled_read_source = tf.function(self._read_source, **options)
        self._compiled_read_more_source = tf.function(
            self._read_more_source_into, **options
        )
        self._compiled_decode = tf.function(self._decode_into, **options)
        self._compiled_verify = tf.function(self._verify_into, **options)

    @property
    def compilations(self):
        return sum(
            function.experimental_get_tracing_count()
            for function in (
                self._compiled_prefill,
                self._compiled_read_source,
                self._compiled_read_more_source,
                self._compiled_decode,
                self._compiled_verify,
            )
        )

    def _prefill(self, token_ids, length, source):
        cache = self.new_cache(*token_ids.shape)
        with outside_of_strategies():
            for variable in tree.flatten(cache):
                variable.assign(tf.zeros_like(variable))
        if source:
            cache = self._read_source_into(token_ids, cache, source)
        start = np.int32(self.lm.read_with(source))
        return self._prefill_more(token_ids, length, cache, start)

    def _prefill_more(self, token_ids, length, cache, start):
        arguments = (
            self._packed(self.rows_of_chunk(token_ids)),
            cache,
            tf.constant(token_ids),
            tf.constant(length),
            tf.constant(start),
        )
        if is_waiting():
            self._compiled_prefill.get_concrete_function(*arguments)
            proceed()
        _call(self._compiled_prefill, *arguments)
        return cache

    def _read_source_into(self, token_ids, variables, source):
        """`_read_source()`, with variables of the length of what was read."""
        cache = _call(
            self._compiled_read_source,
            tf.constant(token_ids),
            variables,
            tree.map_structure(tf.convert_to_tensor, source),
        )

        def moved(variable, x):
            if variable.shape != x.shape:
                return tf.Variable(x)
            variable.assign(x)
            return variable

        with outside_of_strategies():
            return tree.map_structure(moved, variables, cache)

    def _read_more_source(self, token_ids, cache, source, start):
        _call(
            self._compiled_read_more_source,
            cache,
            tf.constant(token_ids),
            tree.map_structure(tf.convert_to_tensor, source),
            tf.constant(start),
        )
        return cache

    def put_row(self, cache, row, row_cache):
        with outside_of_strategies():
            for variable, x in zip(
                tree.flatten(cache), tree.flatten(row_cache)
            ):
                variable[row : row + 1].assign(x)
        return cache

    def restore_cache(self, arrays):
        with outside_of_strategies():
            return tree.map_structure(tf.Variable, arrays)

    def _decode(self, generation, *args):
        return self._update(self._compiled_decode, 1, generation, *args)

    def _verify(self, generation, *args):
        *_, count, _ = args
        return self._update(self._compiled_verify, count + 1, generation, *args)

    def _update(self, function, length, generation, *args):
        arguments = self._arguments(length, generation, *args)
        cache = generation.cache
        return _call(function, *arguments)._replace(cache=cache)

    def _arguments(self, length, generation, *args):
        packed = self._packed(len(generation.token_ids) * length)
        return (
            packed,
            generation.cache,
            *tree.map_structure(
                _as_tensor, (generation._replace(cache=()), *args)
            ),
        )

    def _can_prepare(self):
        return super()._can_prepare() and not tf.distribute.has_strategy()

    def _cache_like_a_prefill_s(self, batch, slots):
        # Which the prefill is to find.
        cache = self.new_cache(batch, slots)
        self.keep(cache)
        return cache

    def _prepare(self, generation, *args):
        self._compiled_decode.get_concrete_function(
            *self._arguments(1, generation, *args)
        )

    def _packed(self, rows):
        with outside_of_strategies():
            return packed_now(self.own_products, rows)

    def _new_tensor(self, shape, dtype):
        # One by one: beside a cache of tensors, there would be two.
        with outside_of_strategies():
            return tf.Variable(tf.zeros(shape, dtype))

    def _read_source(self, token_ids, variables, source):
        cache = tree.map_structure(tf.convert_to_tensor, variables)
        return super()._read_source(token_ids, cache, source)

    def _read_more_source_into(self, variables, token_ids, source, start):
        cache = tree.map_structure(tf.convert_to_tensor, variables)
        _assign(
            variables,
            super()._read_more_source(token_ids, cache, source, start),
        )

    def _prefill_into(self, packed, variables, token_ids, length, start):
        cache = tree.map_structure(tf.convert_to_tensor, variables)
        with multiplying_with(self.own_products, packed):
            _assign(variables, self._fill(token_ids, length, cache, start))

    def _decode_into(
        self, packed, variables, generation, bounds, values, structure
    ):
        with multiplying_with(self.own_products, packed):
            return self._decode_all(
                variables, generation, bounds, values, structure
            )

    def _decode_all(self, variables, generation, bounds, values, structure):
        cache = tree.map_structure(tf.convert_to_tensor, variables)
        call, pick = self._make_call(), self._picker(values, structure)
        _, generation = ops.while_loop(
            lambda i, generation: tf.logical_and(
                i < bounds.steps, self._unfinished(generation, bounds)
            ),
            lambda i, generation: (
                i + 1,
                self._step(call, pick, generation, bounds),
            ),
            (tf.constant(0), generation._replace(cache=cache)),
        )
        _assign(variables, generation.cache)
        return generation._replace(cache=())

    def _verify_into(self, packed, variables, generation, *args):
        cache = tree.map_structure(tf.convert_to_tensor, variables)
        with multiplying_with(self.own_products, packed):
            generation = super()._verify(
                generation._replace(cache=cache), *args
            )
        _assign(variables, generation.cache)
        return generation._replace(cache=())

    def _make_call(self, length=1):
        call = super()._make_call(length)
        matrices = kernels_as_matrices(self.lm)

        def call_on_matrices(generation):
            with using_matrices(matrices, self.variables):
                return call(generation)

        return call_on_matrices


@contextlib.contextmanager
def outside_of_strategies():
    """In this scope, there is no `tf.distribute.Strategy` around.

    A variable that is made in the scope of one has a copy on every device, and
    a function is then on none. A text is generated on one device: it reads
    the copies there of weights that were made in such a scope.
    """
    if not tf.distribute.has_strategy():
        yield
        return
    # Strategies cannot be nested, not even the one that is there by default.
    # But each belongs to the graph that is the default one.
    eager_mode = tf.__internal__.eager_context.eager_mode
    with tf.Graph().as_default(), eager_mode():
        yield


def _is_on_several_devices(variable):
    """Whether a `keras.Variable` was made in the scope of a strategy."""
    value = variable.value
    return (
        isinstance(value, tf.distribute.DistributedValues)
        and len(value.values) > 1
    )


# How often a function was traced when it was called the last time. That it is
# traced ahead compiles nothing yet.
_traced = weakref.WeakKeyDictionary()


def _call(function, *args):
    """Calls a `tf.function`, and tidies up after the compiler if it ran."""
    with outside_of_strategies():
        output = function(*args)
    count = function.experimental_get_tracing_count()
    if count > _traced.get(function, 0):
        _traced[function] = count
        give_back_free_memory()
    return output


def give_back_free_memory():
    """Gives back to the system what lies free between what is in use.

    What a compiler leaves is too scattered for a cache to fill: for GPT-2 some
    50 MiB that nothing would use again. Only glibc keeps it.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _assign(variables, cache):
    """Moves a cache into variables."""
    for variable, value in zip(tree.flatten(variables), tree.flatten(cache)):
        variable.assign(value)


def _as_tensor(x):
    """Arrays as tensors, and what is not a number as it is."""
    return tf.convert_to_tensor(x) if hasattr(x, "dtype") else x
