"""What generating is: a prefill, then decode steps."""

import collections
import typing

import keras
import numpy as np
from keras import ops
from keras import tree
from keras_hub.samplers import GreedySampler
from keras_hub.samplers import Sampler
from keras_hub.samplers import SpeculativeSampler

from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.generate.loops.access import loop_access
from keras_nlp_cache.generate.loops.speculative import verify_step

# The fewest slots of a cache. Sizes are powers of two, so that texts of similar
# length share what was compiled.
FEWEST_SLOTS = 256


class Generation(typing.NamedTuple):
    """A batch of texts, and all that is needed to go on with them.

    Attributes:
        token_ids: int32 `(B, S)`. Zeros after the last token.
        given: bool `(B, S)`. Where a token is part of a prompt.
        done: bool `(B,)`. Which rows have generated a stop token.
        index: int32 scalar. The slot of the last token, of which nothing is in
            the cache yet.
        cache: As from `backbone.make_cache(B, S)`.
    """

    token_ids: typing.Any
    given: typing.Any
    done: typing.Any
    index: typing.Any
    cache: typing.Any


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


class Conditions:
    """What a model is when something is compiled for it.

    Values of variables are not part of it. Equal to others if nothing else
    that was compiled has changed.

    Args:
        lm: A `CausalLM`.
        *methods: Names of methods that are called.
        attributes: bool. Whether attributes of the sampler matter, such as its
            temperature.
    """

    def __init__(self, lm, *methods, attributes=True):
        sampler, base = lm.sampler, getattr(lm.sampler, "base_sampler", None)
        objects = [sampler, base, *lm.variables]
        for name in methods:
            objects += [vars(lm).get(name), getattr(type(lm), name)]
        self._objects = objects
        self._values = (
            lm.run_eagerly,
            lm.generation_jit_compile,
            lm.cache_dtype,
            keras.config.floatx(),
            _state(sampler) if attributes else None,
        )

    def __eq__(self, other):
        return (
            len(self._objects) == len(other._objects)
            and all(a is b for a, b in zip(self._objects, other._objects))
            and self._values == other._values
        )


class _Identity:
    """Compares equal to what is the same object, which it keeps alive."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.x is other.x


def _state(x):
    """What can be compared later, to tell whether something was changed."""
    if x is None or isinstance(x, (bool, int, float, str, bytes)):
        return type(x), x
    if isinstance(x, np.ndarray):
        return x.shape, x.dtype.str, x.tobytes()
    if isinstance(x, (list, tuple)):
        return type(x), [_state(y) for y in x]
    if isinstance(x, dict):
        return type(x), [(_state(k), _state(v)) for k, v in x.items()]
    if isinstance(x, Sampler):
        return _Identity(x), _state(vars(x))
    return _Identity(x)


def slots_for(length, limit=None):
    """How many slots to make for a text of some length.

    Args:
        length: int.
        limit: Optional int. The number of positions that the model learned.
    """
    slots = max(FEWEST_SLOTS, 1 << (length - 1).bit_length())
    return slots if limit is None else max(length, min(slots, limit))


def decode_step(sampler, call, generation, stop_token_ids):
    """Generates one token in every row.

    Args:
        sampler: What picks tokens.
        call: Function from a `Generation` to `(logits, cache)`, logits
            `(B, vocabulary_size)` of what follows its last tokens.
        generation: A `Generation`.
        stop_token_ids: int32 `(N,)`.

    Returns:
        The `Generation` with one token more. Where the prompt of a row is
        longer than that of others, the token is the prompt's.
    """
    token_ids, given, done, index, cache = generation
    batch = ops.shape(token_ids)[0]
    logits, cache = call(generation)
    probabilities = sampler.compute_probabilities(logits)
    next_token = sampler.get_next_token(probabilities)

    index = index + 1
    known = ops.slice(token_ids, start_at(0, index), (batch, 1))[:, 0]
    is_given = ops.slice(given, start_at(0, index), (batch, 1))[:, 0]
    next_token = ops.where(is_given, known, ops.cast(next_token, "int32"))
    stops = ops.any(next_token[:, None] == stop_token_ids[None], axis=1)
    done = ops.logical_or(
        done, ops.logical_and(stops, ops.logical_not(is_given))
    )
    token_ids = ops.slice_update(
        token_ids, start_at(0, index), next_token[:, None]
    )
    return Generation(token_ids, given, done, index, cache)


def unfinished(generation, limit):
    """Whether there is room for another token, and a row to use it."""
    return ops.logical_and(
        generation.index + 1 < limit,
        ops.logical_not(ops.all(generation.done)),
    )


def _copied(arrays):
    return tree.map_structure(lambda x: np.array(x, copy=True), arrays)


class Loop:
    """Generation with its loop in Python, on any backend.

    The compiled loops are subclasses, and replace methods with an underscore.
    A loop is for a model as it is: if `is_current()` is false, another one has
    to be made.

    Args:
        lm: A `CausalLM` whose sampler is one that `supports()` knows.

    Attributes:
        sampler: What picks tokens.
        access: The `Access` to its cache.
        compilations: int. How many functions were compiled so far.
        tokens_per_piece: int. How many tokens `steps()` generates at a time.
    """

    # A prompt goes through the model in pieces, for memory to be bounded.
    chunk = 512
    compilations = 0
    tokens_per_piece = 1
    # Whether what the sampler's attributes were is part of what is compiled.
    compiles_sampler = False

    def __init__(self, lm):
        self.lm = lm
        self.sampler = token_sampler(lm.sampler)
        self.access = loop_access()
        self.variables = lm.variables
        self._made_for = self._conditions()

    def is_current(self):
        """Whether the model and its sampler are still what they were.

        Values of variables may change.
        """
        return self._conditions() == self._made_for

    def _conditions(self):
        return Conditions(
            self.lm, "call_with_cache", attributes=self.compiles_sampler
        )

    def prefill(self, token_ids, given, slots, cache=None, start=0):
        """Starts to generate after prompts.

        Args:
            token_ids: int32 array `(B, T)`, prompts padded at their end.
            given: bool array `(B, T)`, false for padding.
            slots: int. How long texts may become; see `slots_for()`.
            cache: The cache of an earlier `Generation`, of as many slots, not
                to be used any more. Defaults to a new one.
            start: int. How many slots of `cache` are filled with what
                `token_ids` begins with.

        Returns:
            A `Generation` up to the end of the shortest prompt.

        Raises:
            ValueError: If the model learned fewer positions than `slots`.
        """
        batch, length = token_ids.shape
        self.lm.backbone.check_cache_size(batch, slots)
        padding = ((0, 0), (0, slots - length))
        args = (
            np.pad(np.asarray(token_ids, "int32"), padding),
            np.pad(np.asarray(given, "bool"), padding),
            np.int32(np.sum(given, axis=1).min()),
        )
        if cache is None:
            return self._prefill(*args)
        return self._prefill_more(*args, cache, np.int32(start))

    def restore_cache(self, arrays):
        """A cache to go on with, from copies of its arrays.

        Args:
            arrays: Pairs of arrays, one pair for each decoder block.
        """
        return tree.map_structure(ops.convert_to_tensor, _copied(arrays))

    def decode(self, generation, limit, stop_token_ids=()):
        """Generates until texts have some length, or all rows are done.

        Args:
            generation: A `Generation`, not to be used any more.
            limit: int. The number of tokens to reach, prompts included.
            stop_token_ids: Sequence of ints. A row is done once it has
                generated one of them.

        Returns:
            The `Generation` that was reached.
        """
        return self._decode(
            generation, np.int32(limit), self._padded(stop_token_ids)
        )

    def steps(self, generation, limit, stop_token_ids=()):
        """Generates as `decode()` does, `tokens_per_piece` at a time.

        Args:
            generation: A `Generation`, not to be used any more.
            limit: int, as for `decode()`.
            stop_token_ids: Sequence of ints, as for `decode()`.

        Yields:
            A `Generation` after each step, not to be used after the next.
        """
        return self._steps(
            generation, np.int32(limit), self._padded(stop_token_ids)
        )

    def release(self, generation):
        """Says that a `Generation` is not to be used any more.

        Its cache may then be that of the next one.
        """

    def verify(self, generation, drafted, count, limit, stop_token_ids=()):
        """Adds those of some guesses that are right, and one token more.

        Args:
            generation: A `Generation`, not to be used any more.
            drafted: int32 tensor `(B, S)`, its token ids with guesses after
                them.
            count: int. How many guesses there are.
            limit: int. The number of tokens not to exceed.
            stop_token_ids: Sequence of ints, as for `decode()`.

        Returns:
            The `Generation` that was reached. See `verify_step()`.
        """
        return self._verify(
            generation,
            drafted,
            count,
            np.int32(limit),
            self._padded(stop_token_ids),
        )

    @staticmethod
    def _padded(stop_token_ids):
        """An array of one of few sizes, for their number to compile nothing."""
        count = len(stop_token_ids)
        padded = np.full(max(8, 1 << max(count - 1, 0).bit_length()), -1)
        padded[:count] = stop_token_ids
        return padded.astype("int32")

    def _prefill(self, token_ids, given, length):
        cache = self.lm.backbone.make_cache(
            *token_ids.shape, self.lm.cache_dtype
        )
        return self._prefill_more(token_ids, given, length, cache, 0)

    def _prefill_more(self, token_ids, given, length, cache, start):
        with accessing(self.access):
            for at in range(start, length - 1, self.chunk):
                end = min(at + self.chunk, int(length) - 1)
                _, cache = self.lm.read(token_ids[:, at:end], cache, at)
        return Generation(
            token_ids=ops.convert_to_tensor(token_ids),
            given=ops.convert_to_tensor(given),
            done=ops.zeros(len(token_ids), "bool"),
            index=int(length) - 1,
            cache=cache,
        )

    def _decode(self, generation, limit, stop_token_ids):
        for latest in self._steps(generation, limit, stop_token_ids):
            generation = latest
        return generation

    def _steps(self, generation, limit, stop_token_ids):
        stop_token_ids = ops.convert_to_tensor(stop_token_ids)
        call = self._make_call()
        while unfinished(generation, limit):
            generation = self._step(call, generation, stop_token_ids)
            yield generation

    def _step(self, call, generation, stop_token_ids):
        with accessing(self.access):
            return decode_step(self.sampler, call, generation, stop_token_ids)

    def _verify(self, generation, drafted, count, limit, stop_token_ids):
        with accessing(self.access):
            return verify_step(
                self.sampler,
                self._make_call(count + 1),
                generation,
                drafted,
                count,
                limit,
                ops.convert_to_tensor(stop_token_ids),
            )

    def _make_call(self, length=None):
        """The `call` of `decode_step()`, or of `verify_step()`.

        Args:
            length: Optional int. How many tokens to read. Defaults to one,
                whose logits are then `(B, vocabulary_size)`.
        """

        def call(generation):
            token_ids, _, _, index, cache = generation
            size = (ops.shape(token_ids)[0], length or 1)
            logits, _, cache = self.lm.call_with_cache(
                ops.slice(token_ids, start_at(0, index), size),
                cache,
                index,
                **self._further_inputs(generation, size),
            )
            return logits if length else logits[:, 0], cache

        return call

    def _further_inputs(self, generation, size):
        """What the backbone is told of tokens besides, if it wants to know.

        Args:
            generation: A `Generation`.
            size: `(B, T)`, the tokens from its last on.
        """
        if not self.lm.backbone.takes_generated:
            return {}
        given = generation.given
        # At the last slot, nothing that was given follows.
        follows = ops.concatenate(
            [given[:, 1:], ops.zeros_like(given[:, :1])], axis=1
        )
        follows = ops.slice(follows, start_at(0, generation.index), size)
        return {"generated": ops.cast(ops.logical_not(follows), "int32")}


class CompiledLoop(Loop):
    """What loops that are compiled as a whole have in common.

    One cache that is done with is kept for the next prefill. The memory of
    another would often be new: TensorFlow gives that of variables back when XLA
    runs the next time, and on JAX what lies between is too small to use again.
    """

    # A prompt fills its last chunk by half on average, and 32 rows are enough
    # to keep two cores busy. One size, for one compilation.
    chunk = 32
    compiles_sampler = True

    def __init__(self, lm):
        super().__init__(lm)
        self._spare_caches = collections.deque(maxlen=1)

    def release(self, generation):
        self._spare_caches.append(generation.cache)

    def _take_cache(self, batch, slots):
        """A cache to write over, with anything in it."""
        dtype = self.lm.cache_dtype or self.lm.backbone.compute_dtype
        shapes = [
            (batch, heads, slots, dim)
            for heads, dim in self.lm.backbone.cache_spec
        ]
        try:
            spare = self._spare_caches.pop()
        except IndexError:
            spare = ()
        if [tuple(key.shape) for key, _ in spare] == shapes:
            return spare
        del spare  # Before there are two.
        return tuple(
            tuple(self._new_tensor(shape, dtype) for _ in range(2))
            for shape in shapes
        )

    def _fill(self, token_ids, given, length, cache, start=0):
        """Prefills, to be compiled: `length` and `start` may be tensors."""
        batch, slots = ops.shape(token_ids)
        chunk = min(self.chunk, slots)

        def body(i, cache):
            # The last chunk may overlap the one before, and writes the same.
            # What it writes past the prompt is written again before it is read.
            at = ops.minimum(start + i * chunk, slots - chunk)
            tokens = ops.slice(token_ids, start_at(0, at), (batch, chunk))
            return self.lm.read(tokens, cache, at)[1]

        with accessing(self.access):
            cache = ops.fori_loop(
                0, (length - 1 - start + chunk - 1) // chunk, body, cache
            )
        return Generation(
            token_ids=token_ids,
            given=given,
            done=ops.zeros((batch,), "bool"),
            index=length - 1,
            cache=cache,
        )

    def _steps(self, generation, limit, stop_token_ids):
        while (end := int(generation.index) + 1) < limit:
            end = min(end + self.tokens_per_piece, limit)
            generation = self._decode(generation, np.int32(end), stop_token_ids)
            yield generation
            if ops.convert_to_numpy(generation.done).all():
                return
