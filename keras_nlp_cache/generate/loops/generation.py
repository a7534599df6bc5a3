"""What generating is: a prefill, then decode steps."""

import contextlib
import typing

import numpy as np
from keras import ops
from keras import tree

from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.cache.slots import slots as slots_from
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.device import constants
from keras_nlp_cache.generate.loops import sampling
from keras_nlp_cache.generate.loops.access import loop_access
from keras_nlp_cache.generate.loops.conditions import Conditions
from keras_nlp_cache.generate.options.logprobs import top_logprobs
from keras_nlp_cache.generate.options.options import Options
from keras_nlp_cache.generate.options.processing import process

# The fewest slots of a cache. Sizes are powers of two, so that texts of similar
# length share what was compiled.
FEWEST_SLOTS = 256
# As many steps as there are.
ALL = np.iinfo("int32").max


class Generation(typing.NamedTuple):
    """A batch of texts, and all that is needed to go on with them.

    Each row stands at a place of its own.

    Attributes:
        token_ids: int32 `(B, S)`. Whatever after the last token.
        index: int32 `(B,)`. The slot of the last token, of which nothing is in
            the cache yet.
        given: int32 `(B,)`. How many tokens were not generated, the first ones.
        done: bool `(B,)`. Which rows have generated a stop token.
        stream: `(B, 2)` or `(B, 0)`. See `sampling.streams()`.
        logprobs: `(logprob, top_ids, top_logprobs)` of the tokens in their
            slots, float32 `(B, S)`, int32 and float32 `(B, S, k)`. `()` if
            nobody asked.
        cache: As from `backbone.make_cache(B, S)`.
    """

    token_ids: typing.Any
    index: typing.Any
    given: typing.Any
    done: typing.Any
    stream: typing.Any
    logprobs: typing.Any
    cache: typing.Any

    def ended(self, limit):
        """Which rows need no more tokens, bool `(B,)`."""
        is_full = ops.greater_equal(self.index + 1, limit)
        return ops.logical_or(self.done, is_full)


class Bounds(typing.NamedTuple):
    """How far to generate.

    Attributes:
        limit: int32 `(B,)`. How many tokens each row is to have at most,
            prompt included.
        stops: int32 `(N,)`. A row is done once it has generated one of them.
        steps: int32 scalar. How many decode steps to make at most.
        enough: int32 scalar. How many rows are to have ended, no more steps
            are made then.
    """

    limit: typing.Any
    stops: typing.Any
    steps: typing.Any
    enough: typing.Any


def slots_for(length, limit=None):
    """How many slots to make for a text of some length.

    Args:
        length: int.
        limit: Optional int. The number of positions that the model learned.
    """
    slots = max(FEWEST_SLOTS, 1 << (length - 1).bit_length())
    return slots if limit is None else max(length, min(slots, limit))


def decode_step(pick, call, generation, bounds):
    """Generates one token in every row that has not ended.

    Args:
        pick: Function `(logits, generation, lengths) -> (tokens, stream)`. See
            `Loop.pick()`.
        call: Function from a `Generation` to `(logits, cache)`, logits
            `(B, 1, vocabulary_size)` of what follows its last tokens.
        generation: A `Generation`.
        bounds: `Bounds`.

    Returns:
        The `Generation` with one token more.
    """
    logits, cache = call(generation)
    token, stream = pick(logits, generation, generation.index[:, None] + 1)
    stops = ops.any(token == bounds.stops[None], axis=1)
    if generation.index.shape[0] == 1:
        # A row that is alone has not ended, or there would be no step.
        index = generation.index + 1
    else:
        going = ops.logical_not(generation.ended(bounds.limit))
        index = generation.index + ops.cast(going, "int32")
        stops = ops.logical_and(going, stops)
        going = going[:, None]
        last = tokens_from(generation.token_ids, generation.index)
        token = ops.where(going, token, last)
        stream = ops.where(going, stream, generation.stream)
    told = generation.logprobs
    if told:
        here = slots_from(0, generation.token_ids.shape[1]) == index[:, None]
        if generation.index.shape[0] > 1:
            here = ops.logical_and(here, going)
        told = with_logprobs(told, logits, token, here, ops.zeros_like(here))
    return generation._replace(
        token_ids=_written(generation.token_ids, token, index),
        index=index,
        done=ops.logical_or(generation.done, stops),
        stream=stream,
        logprobs=told,
        cache=cache,
    )


def _written(token_ids, token, index):
    """Token ids `(B, S)` with a token `(B, 1)` in a slot of each row."""
    index = index if index.shape[0] > 1 else index[0]
    written = access().write(
        token_ids[:, None, :, None], token[:, None, :, None], index
    )
    return written[:, 0, :, 0]


def with_logprobs(logprobs, logits, tokens, is_new, which):
    """Adds what is to be told of new tokens.

    Args:
        logprobs: See `Generation`.
        logits: Tensor `(B, N, vocabulary_size)`.
        tokens: int32 `(B, N)`, what was picked.
        is_new: bool `(B, S)`. Which slots have a new token.
        which: int `(B, S)`. Which of the `N` that is.
    """
    if not logprobs:
        return ()
    batch, count, size = ops.shape(logits)
    told = top_logprobs(
        ops.reshape(logits, (batch * count, size)),
        ops.reshape(tokens, (-1,)),
        ops.shape(logprobs[1])[2],
    )
    which = ops.cast(which, "int32")

    def in_slots(old, x):
        x = ops.reshape(x, (batch, count, -1))
        x = ops.take_along_axis(x, which[:, :, None], axis=1)
        x = ops.where(is_new[:, :, None], x, ops.reshape(old, ops.shape(x)))
        return ops.reshape(x, ops.shape(old))

    return tuple(in_slots(old, x) for old, x in zip(logprobs, told))


def tokens_from(token_ids, index, length=1):
    """Some tokens of each row, int32 `(B, length)`, from a slot of its own."""
    if length == 1 and index.shape[0] == 1:
        return ops.take(token_ids, index, axis=1)
    where = slots_from(index, length)
    # A row that has ended may have no more slots behind it.
    where = ops.minimum(where, ops.shape(token_ids)[1] - 1)
    return ops.take_along_axis(token_ids, where, axis=1)


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
        reads_together: bool. Whether it takes less time to read several prompts
            at once, rather than one after the other.
        in_step: bool. Whether all rows have to stand at the same place, as for
            a `call_with_cache()` of a user's, who knows of no other.
        compilations: int. How many functions were compiled so far.
        tokens_per_piece: int. How many tokens `steps()` generates at a time.
    """

    reads_together = True
    compilations = 0
    tokens_per_piece = 1
    # Whether what the sampler's attributes were is part of what is compiled.
    compiles_sampler = False

    def __init__(self, lm):
        self.lm = lm
        # A prompt goes through the model in pieces.
        self.chunk = constants().eager_chunk
        self.sampler = sampling.token_sampler(lm.sampler)
        self.access = loop_access()
        self.in_step = bool(lm.overridden("call_with_cache"))
        self.variables = lm.variables
        self._structures = {}
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

    # === What it is for ===

    def start(self, token_ids, given, slots, cache, stream=None, logprobs=None):
        """The `Generation` of prompts that are in a cache.

        Args:
            token_ids: int32 array `(B, T)`, prompts padded at their end.
            given: int array `(B,)`, how many tokens they have. 0 for a row
                that is not in use.
            slots: int. How long texts may become; see `slots_for()`.
            cache: A cache of as many slots.
            stream: Optional array, see `Generation`. Defaults to those of the
                first prompts of a call.
            logprobs: Optional int. See `Options.return_logprobs`.
        """
        batch, length = token_ids.shape
        if stream is None:
            stream = sampling.streams(self.sampler, range(batch))
        told = ()
        if logprobs is not None:
            shape = batch, slots, logprobs
            told = (
                np.zeros(shape[:2], "float32"),
                np.zeros(shape, "int32"),
                np.zeros(shape, "float32"),
            )
        padding = ((0, 0), (0, slots - length))
        given = np.asarray(given, "int32")
        return Generation(
            token_ids=np.pad(np.asarray(token_ids, "int32"), padding),
            index=np.maximum(given - 1, 0),
            given=given,
            done=given == 0,
            stream=stream,
            logprobs=told,
            cache=cache,
        )

    def preparing(
        self, batch, slots, stop_token_ids=(), options=None, logprobs=None
    ):
        """A scope for a prefill, in which its decode steps are prepared.

        Where they are compiled, that is done while the prompts are read.

        Args:
            batch: int. How many prompts there are.
            slots: int, as for the `prefill()`.
            stop_token_ids: Sequence of ints, as for the `decode()` or `steps()`
                that follow.
            options: Optional `Options`, as for these.
            logprobs: Optional int, as for the `prefill()`.

        Returns:
            A context manager.
        """
        return contextlib.nullcontext()

    def prefill(
        self,
        token_ids,
        given,
        slots,
        cache=None,
        start=0,
        stream=None,
        logprobs=None,
        source=None,
    ):
        """Starts to generate after prompts.

        Prompts of one length are read together, others one after the other,
        unless the model treats each row in its own way, or reads something
        else with them.

        Args:
            token_ids: int32 array `(B, T)`, prompts padded at their end.
            given: bool array `(B, T)`, false for padding.
            slots: int. How long texts may become; see `slots_for()`.
            cache: The cache of an earlier `Generation`, of as many slots, not
                to be used any more. Defaults to a new one.
            start: int. How many slots of `cache` are filled with what
                `token_ids` begins with.
            stream: Optional array, as for `start()`.
            logprobs: Optional int, as for `start()`.
            source: Optional dictionary, as for `read()`.

        Returns:
            A `Generation`.

        Raises:
            ValueError: If the model learned fewer positions than `slots`.
        """
        batch = len(token_ids)
        self.lm.backbone.check_cache_size(batch, slots)
        lengths = np.sum(given, axis=1)
        # What is read past the end of a prompt is written again before it
        # counts.
        alike = (lengths == lengths[0]).all()
        as_one = cache is not None or self.lm.backbone.rows is not None
        if as_one and not alike and self.lm.backbone.has_states:
            raise ValueError(
                "Expected prompts of one length for a model that keeps states "
                "and treats each row in its own way. Received prompts of "
                f"{sorted(set(lengths.tolist()))} tokens, of which what is "
                "read past the end of one would change its state. Generate "
                "those of each length for themselves."
            )
        # The length of what an encoder has read, a new cache does not know.
        as_one |= bool(self.lm.backbone.roles.of_source)
        if as_one or alike:
            cache = self.read(
                token_ids, int(lengths.max()), slots, cache, start, source
            )
        else:
            cache, row_cache = self.new_cache(batch, slots), None
            for row, length in enumerate(lengths):
                of_row = None
                if source:
                    of_row = {k: x[row : row + 1] for k, x in source.items()}
                    if row_cache is not None:
                        self.keep(row_cache)
                        row_cache = None
                row_cache = self.read(
                    token_ids[row, :length],
                    int(length),
                    slots,
                    row_cache,
                    source=of_row,
                )
                cache = self.put_row(cache, row, row_cache)
            self.keep(row_cache)
        return self.start(token_ids, lengths, slots, cache, stream, logprobs)

    def read(self, token_ids, length, slots, cache=None, start=0, source=None):
        """Reads a prompt, or several at once, all but the last token.

        Args:
            token_ids: int32 array `(T,)`, or `(B, T)`.
            length: int. How many of them to have read but one.
            slots: int. How many slots the cache has.
            cache: Optional cache of as many rows, not to be used any more.
                Defaults to a new one.
            start: int. How many slots of `cache` are filled with what
                `token_ids` begins with.
            source: Optional dictionary of arrays, inputs of the backbone that
                are not of the text: what an encoder is to read, or images
                among the tokens from `start` on. Later calls find in the
                cache what became of them.

        Returns:
            A cache of as many rows.
        """
        token_ids = np.atleast_2d(token_ids)
        padded = np.zeros((len(token_ids), slots), "int32")
        padded[:, : token_ids.shape[1]] = token_ids
        if source:
            chunk = self._chunk_of_prefill(slots)
            source = self.lm.fitted_source(
                source, length - start, slots - start, chunk
            )
        if cache is None:
            return self._prefill(padded, np.int32(length), source or {})
        if source:
            cache = self._read_more_source(
                padded, cache, source, np.int32(start)
            )
            start += self.lm.read_with(source)
        return self._prefill_more(
            padded, np.int32(length), cache, np.int32(start)
        )

    def new_cache(self, batch, slots):
        """A cache to write over, with anything in it."""
        return self.empty_cache(batch, slots)

    def empty_cache(self, batch, slots):
        """A cache of zeros."""
        return self._make_cache(batch, slots)

    def _make_cache(self, batch, slots, **kwargs):
        """A cache of the model, as `backbone.make_cache()` makes it."""
        return self.lm.backbone.make_cache(
            batch, slots, self.lm.cache_dtype, self.lm.cache_policy, **kwargs
        )

    def put_row(self, cache, row, row_cache):
        """Puts the cache of one row in the place of another.

        Args:
            cache: A cache, not to be used any more.
            row: int. Which row of it.
            row_cache: A cache of one row, which is left as it is.

        Returns:
            The cache with that row.
        """
        return tree.map_structure(
            lambda x, y: ops.slice_update(
                x, start_at(row, *[0] * (x.ndim - 1)), y
            ),
            cache,
            row_cache,
        )

    def restore_cache(self, arrays):
        """A cache to go on with, from copies of its arrays.

        Args:
            arrays: Pairs of arrays, one pair for each decoder block.
        """
        return tree.map_structure(ops.convert_to_tensor, _copied(arrays))

    def decode(
        self,
        generation,
        limit,
        stop_token_ids=(),
        options=None,
        steps=ALL,
        enough=None,
    ):
        """Generates until texts have some length, or all rows are done.

        Args:
            generation: A `Generation`, not to be used any more.
            limit: int, or array `(B,)`. The number of tokens to reach, prompts
                included.
            stop_token_ids: Sequence of ints. A row is done once it has
                generated one of them.
            options: Optional `Options`.
            steps: int. How many steps to make at most.
            enough: Optional int. How many rows are to have ended. Defaults to
                all.

        Returns:
            The `Generation` that was reached.
        """
        batch = len(generation.token_ids)
        bounds = self._bounds(batch, limit, stop_token_ids, steps, enough)
        return self._decode(generation, bounds, *self._options(options))

    def steps(self, generation, limit, stop_token_ids=(), options=None):
        """Generates as `decode()` does, `tokens_per_piece` at a time.

        Args:
            generation: A `Generation`, not to be used any more.
            limit: int, as for `decode()`.
            stop_token_ids: Sequence of ints, as for `decode()`.
            options: Optional `Options`.

        Yields:
            A `Generation` after each step, not to be used after the next.
        """
        values, structure = self._options(options)
        batch = len(generation.token_ids)
        bounds = self._bounds(
            batch, limit, stop_token_ids, self.tokens_per_piece
        )
        return self._steps(generation, bounds, values, structure)

    def _steps(self, generation, bounds, values, structure):
        while not np.all(ops.convert_to_numpy(generation.ended(bounds.limit))):
            generation = self._decode(generation, bounds, values, structure)
            yield generation

    def release(self, generation):
        """Says that a `Generation` is not to be used any more.

        Its cache may then be that of the next one. The sampler goes on after
        what was drawn.
        """
        self.advance(drawn(generation.stream))
        self.keep(generation.cache)

    def advance(self, drawn):
        """Has the sampler go on after so much was drawn.

        Args:
            drawn: int. See `sampling.advance()`.
        """
        sampling.advance(self.sampler, drawn)

    def keep(self, cache):
        """Takes a cache that is not to be used any more."""

    def verify(
        self,
        generation,
        drafted,
        count,
        limit,
        stop_token_ids=(),
        options=None,
    ):
        """Adds those of some guesses that are right, and one token more.

        Args:
            generation: A `Generation`, not to be used any more.
            drafted: int32 tensor `(B, S)`, its token ids with guesses after
                them.
            count: int. How many guesses there are in each row.
            limit: int, or array `(B,)`. The number of tokens not to exceed.
            stop_token_ids: Sequence of ints, as for `decode()`.
            options: Optional `Options`.

        Returns:
            The `Generation` that was reached. See `verify_step()`.
        """
        batch = len(generation.token_ids)
        bounds = self._bounds(batch, limit, stop_token_ids)
        values, structure = self._options(options)
        return self._verify(
            generation, drafted, bounds, values, count, structure
        )

    def evaluate(self, function, *args):
        """Calls a function of the model, which is not compiled."""
        return function(*args)

    # === How it is done ===

    def _bounds(self, batch, limit, stops, steps=ALL, enough=None):
        return Bounds(
            limit=np.broadcast_to(np.asarray(limit, "int32"), (batch,)),
            stops=_padded_stops(stops),
            steps=np.int32(steps),
            enough=np.int32(batch if enough is None else enough),
        )

    def _options(self, options):
        """What of options is passed to, and what compiled into, a function."""
        options = options or Options()
        size = self.lm.backbone.token_embedding.input_dim
        # TensorFlow knows what it has compiled for by references that are weak.
        structure = self._structures.setdefault(
            options.structure, options.structure
        )
        return options.values(size), structure

    def pick(self, logits, generation, lengths, values, structure):
        """Picks tokens after texts.

        Args:
            logits: Tensor `(B, N, vocabulary_size)`.
            generation: A `Generation`.
            lengths: int32 `(B, N)`. After how many tokens of its row each token
                follows.
            values: From `Options.values()`.
            structure: `Options.structure`.

        Returns:
            `(tokens, stream)`, as `sampling.pick()`.
        """
        if structure.processes:
            batch, count, size = ops.shape(logits)
            logits = process(
                structure,
                values,
                ops.reshape(logits, (batch * count, size)),
                ops.repeat(generation.token_ids, count, axis=0),
                ops.reshape(lengths, (-1,)),
                ops.repeat(generation.given, count, axis=0),
                self.sampler.temperature,
            )
            logits = ops.reshape(logits, (batch, count, size))
        return sampling.pick(self.sampler, logits, generation.stream)

    def _chunk_of_prefill(self, slots):
        """Of how many tokens what is read has to be a multiple."""
        return 1

    def _prefill(self, token_ids, length, source):
        cache = self.new_cache(*token_ids.shape)
        cache = self._read_source(token_ids, cache, source)
        start = self.lm.read_with(source)
        return self._prefill_more(token_ids, length, cache, start)

    def _read_source(self, token_ids, cache, source):
        """Reads what is not of the text, and the first tokens with it."""
        if not source:
            return cache
        with accessing(self.access):
            return self.lm.read_source(token_ids, cache, source)

    def _read_more_source(self, token_ids, cache, source, start):
        """Reads the same where it does not begin the text."""
        with accessing(self.access):
            return self.lm.read_more_source(token_ids, cache, source, start)

    def _prefill_more(self, token_ids, length, cache, start):
        with accessing(self.access):
            for at in range(int(start), int(length) - 1, self.chunk):
                end = min(at + self.chunk, int(length) - 1)
                _, cache = self.lm.read(token_ids[:, at:end], cache, at)
        return cache

    def _decode(self, generation, bounds, values, structure):
        generation, bounds = tree.map_structure(
            ops.convert_to_tensor, (generation, bounds)
        )
        call = self._make_call()
        pick = self._picker(values, structure)
        steps = 0
        while steps < bounds.steps and self._unfinished(generation, bounds):
            generation = self._step(call, pick, generation, bounds)
            steps += 1
        return generation

    def _picker(self, values, structure):
        def pick(*args):
            return self.pick(*args, values, structure)

        return pick

    @staticmethod
    def _unfinished(generation, bounds):
        """Whether there is a row that is to go on."""
        ended = ops.cast(generation.ended(bounds.limit), "int32")
        return ops.sum(ended) < bounds.enough

    def _step(self, call, pick, generation, bounds):
        with accessing(self.access):
            return decode_step(pick, call, generation, bounds)

    def _verify(self, generation, drafted, bounds, values, count, structure):
        from keras_nlp_cache.generate.loops.speculative import verify_step

        with accessing(self.access):
            return verify_step(
                self._picker(values, structure),
                self._make_call(count + 1),
                *tree.map_structure(
                    ops.convert_to_tensor, (generation, drafted)
                ),
                count,
                tree.map_structure(ops.convert_to_tensor, bounds),
            )

    def _make_call(self, length=1):
        """The `call` of `decode_step()`, or of `verify_step()`.

        Args:
            length: int. How many tokens to read.
        """

        def call(generation):
            index = self._index(generation, length)
            tokens = tokens_from(generation.token_ids, generation.index, length)
            logits, _, cache = self.lm.call_with_cache(
                tokens,
                generation.cache,
                index,
                **self._further_inputs(tokens),
            )
            return logits, cache

        return call

    def _index(self, generation, length):
        """Where the call writes: one slot for all rows, or one for each."""
        index = generation.index
        if length > 1:
            # A row that has ended may stand too far behind for all of these
            # tokens. What it remembers does not matter any more.
            slots = ops.shape(generation.token_ids)[1]
            index = ops.minimum(index, slots - length)
        if index.shape[0] == 1:
            return index[0]
        return ops.max(index) if self.in_step else index

    def _further_inputs(self, tokens):
        """What the backbone is told of tokens besides, if it wants to know.

        Args:
            tokens: int32 `(B, T)`, the tokens from the last ones on. All that
                follows them is generated.
        """
        if not self.lm.backbone.takes_generated:
            return {}
        return {"generated": ops.ones_like(tokens)}


def drawn(stream):
    """How much was drawn from the stream that went furthest, an int."""
    stream = np.asarray(ops.convert_to_numpy(stream))
    return int(stream[:, 1].max()) if stream.shape[1] else 0


def on_host(generation):
    """A `Generation` with arrays for all but its cache."""
    return generation._replace(
        logprobs=tuple(_array(x) for x in generation.logprobs),
        **{
            name: _array(getattr(generation, name))
            for name in ("token_ids", "index", "given", "done", "stream")
        },
    )


def _array(x):
    return np.array(ops.convert_to_numpy(x))


def _padded_stops(stop_token_ids):
    """An array of one of few sizes, for their number to compile nothing."""
    count = len(stop_token_ids)
    padded = np.full(max(8, 1 << max(count - 1, 0).bit_length()), -1)
    padded[:count] = stop_token_ids
    return padded.astype("int32")


def _copied(arrays):
    return tree.map_structure(lambda x: np.array(x, copy=True), arrays)
