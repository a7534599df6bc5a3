"""Many prompts in few places: a row that ends gives its place to the next.

Places are the rows of one cache. A newcomer's prompt is read into a cache of
its own, a piece at a time between the steps of the others, and is then put into
a place that is free. All shapes stay the same, so that nothing is compiled
again.
"""

import itertools

import numpy as np
from keras import tree

from keras_nlp_cache.cache.kept import can_go_back
from keras_nlp_cache.cache.kept import spare
from keras_nlp_cache.generate.loops.answers import ended
from keras_nlp_cache.generate.loops.answers import padded
from keras_nlp_cache.generate.loops.generation import ALL
from keras_nlp_cache.generate.loops.generation import on_host

# How many tokens of newcomers are read before the others go on, and for how
# many steps they do before the next ones are.
_READ = 512
_STEPS = 8
# How many tokens prompts have in common for it to pay to read them once, and
# how many a prompt may be padded by to be read together with another.
_COMMON = 16
_PADDING = 32


class Reader:
    """Reads prompts one after the other, each from where it is another.

    What a prompt begins with is not read again if the one before began with it,
    too.

    Args:
        loop: A `Loop`.
        slots: int. How many slots its cache has.

    Attributes:
        cache: A cache of one row, `None` before anything was read.
        tokens_read: int. How many tokens the model has read for all prompts.
    """

    def __init__(self, loop, slots):
        self._loop, self._slots = loop, slots
        self.cache = None
        self.tokens_read = 0
        self._token_ids = np.zeros(0, "int32")
        self._wanted, self._filled, self._mark = None, 0, 0
        self._source = None

    def begin(self, token_ids, source=None):
        """Turns to another prompt.

        Args:
            token_ids: int32 array `(T,)`.
            source: Optional dictionary, what is read with it, as for
                `Loop.read()`.
        """
        if source is not self._source:
            # Tokens of images say nothing of what is seen.
            self._token_ids, self._source = self._token_ids[:0], source
        count = min(self._filled, len(token_ids) - 1, len(self._token_ids))
        differs = self._token_ids[:count] != token_ids[:count]
        common = int(np.argmax(differs)) if differs.any() else count
        if self.cache is not None and not can_go_back(
            self.cache, self._mark, common
        ):
            common = 0
        self._wanted, self._filled = token_ids, common

    def go_on(self, count=None):
        """Reads on.

        Args:
            count: Optional int. How many tokens to read. Defaults to all.

        Returns:
            How many tokens are still to be read, 0 when only the last one is
            left, which is for the first decode step.
        """
        last = len(self._wanted) - 1
        end = last if count is None else min(last, self._filled + count)
        if self._source is not None:
            end = last
        # In the meantime, there is no cache to go on with.
        cache, self.cache = self.cache, None
        start = self._filled
        if start == 0 and cache is not None:
            self._loop.keep(cache)
            cache = None
        if cache is None or end > start:
            cache = self._loop.read(
                self._wanted,
                end + 1,
                self._slots,
                cache,
                start,
                self._source if start == 0 else None,
            )
        self.tokens_read += end - start
        self.cache, self._filled = cache, end
        self._mark = max(self._mark, end) if start else end
        self._token_ids = self._wanted
        return last - end

    def take(self):
        """The cache, which somebody else goes on with."""
        cache, self.cache = self.cache, None
        self._filled = self._mark = 0
        return cache

    def give(self, cache, token_ids):
        """Takes a cache back that holds all tokens of a text but the last."""
        self.cache, self._token_ids = cache, token_ids
        self._filled = self._mark = len(token_ids) - 1


class Places:
    """Rows of one cache, each with a text of its own or free.

    Args:
        loop: A `Loop`.
        batch: int. How many places there are.
        slots: int. How long texts may become.
        stops: Sequence of ints. A text ends with one of them.
        options: `Options`.
        watch: Optional function `(number, token_ids, given)` that is told every
            few steps how far a text is, and returns how many of its tokens are
            to stay, or `None` for it to go on.

    Attributes:
        reader: The `Reader` of newcomers.
    """

    def __init__(self, loop, batch, slots, stops, options, watch=None):
        self._loop, self._stops, self._options = loop, stops, options
        self._watch, self._slots = watch, slots
        self.reader = Reader(loop, slots)
        self._requests = [None] * batch
        self._limit = np.zeros(batch, "int32")
        self._drawn = 0
        no_text = np.zeros((batch, 1), "int32")
        self._generation = loop.start(
            no_text,
            np.zeros(batch),
            slots,
            None if batch == 1 else loop.new_cache(batch, slots),
            logprobs=options.return_logprobs,
        )

    @property
    def reads_together(self):
        """Whether several prompts are better read at once."""
        # What is read past the end of a prompt would change its state.
        return (
            self._loop.reads_together
            and len(self._requests) > 1
            and not self._loop.lm.backbone.has_states
        )

    @property
    def most_padding(self):
        """How much padding takes no place that is needed."""
        return spare(self._generation.cache) or ALL

    @property
    def free(self):
        """Indices of the places that are free."""
        return [i for i, x in enumerate(self._requests) if x is None]

    @property
    def is_empty(self):
        return len(self.free) == len(self._requests)

    def put_together(self, requests):
        """Reads several prompts at once, and gives each a place."""
        token_ids, _ = padded([x.token_ids for x in requests])
        # What is read past the end of a prompt is written again before it
        # counts.
        cache = self._loop.read(token_ids, token_ids.shape[1], self._slots)
        for i, request in enumerate(requests):
            row = tree.map_structure(lambda x, i=i: x[i : i + 1], cache)
            self._put(request, row)

    def put(self, request):
        """Gives a place to the prompt that the reader has read."""
        if len(self._requests) == 1:
            self._put(request, self.reader.take())
        else:
            self._put(request, self.reader.cache)

    def _put(self, request, row_cache):
        row, generation = self.free[0], self._generation
        self._requests[row] = request
        self._limit[row] = request.limit
        given = len(request.token_ids)
        for name, value in {
            "index": given - 1,
            "given": given,
            "done": False,
            "stream": request.stream,
        }.items():
            getattr(generation, name)[row] = value
        generation.token_ids[row, :given] = request.token_ids
        cache = row_cache
        if len(self._requests) > 1:
            cache = self._loop.put_row(generation.cache, row, row_cache)
        self._generation = generation._replace(cache=cache)

    def step(self, steps=ALL, until_one_ends=False):
        """Goes on with all texts.

        Args:
            steps: int. How many steps to make at most.
            until_one_ends: bool. Whether to come back as soon as a text ends.

        Returns:
            A list with the `Answer` of each text that has ended.
        """
        if self._watch is not None:
            steps = min(steps, _STEPS)
        enough = len(self.free) + 1 if until_one_ends else None
        generation, self._generation = self._generation, None
        # Places that are free are not to go on.
        generation = self._loop.decode(
            generation,
            np.where([x is None for x in self._requests], 0, self._limit),
            self._stops,
            self._options,
            steps,
            enough,
        )
        self._generation = on_host(generation)
        return list(self._ended())

    def _ended(self):
        generation = self._generation
        for row, request in enumerate(self._requests):
            if request is None:
                continue
            answer = ended(generation, row, request, self._watch)
            if answer is None:
                continue
            yield answer
            self._requests[row] = None
            if len(request.stream):
                self._drawn = max(self._drawn, int(generation.stream[row, 1]))
            if len(self._requests) == 1:
                length = int(generation.index[row]) + 1
                self.reader.give(
                    generation.cache, generation.token_ids[row, :length].copy()
                )

    def leave(self):
        """Says that the places are not needed any more."""
        caches = [self.reader.cache]
        if self._generation is not None and len(self._requests) > 1:
            caches.append(self._generation.cache)
        for cache in caches:
            if cache is not None:
                self._loop.keep(cache)
        self._loop.advance(self._drawn)


def _have_beginnings_in_common(requests):
    """Whether prompts have so much in common that it is better read once."""
    first = [tuple(x.token_ids[:_COMMON]) for x in requests]
    first = [x for x in first if len(x) == _COMMON]
    return len(set(first)) < len(first)


def _of_similar_length(requests, most_padding):
    """Yields lists of requests whose prompts have about as many tokens."""
    together = []
    for request in sorted(requests, key=lambda x: len(x.token_ids)):
        shortest = len(together[0].token_ids) if together else 0
        padding = min(max(shortest // 2, _PADDING), most_padding)
        if together and len(request.token_ids) > shortest + padding:
            yield together
            together = []
        together.append(request)
    if together:
        yield together


def run(places, requests):
    """Answers requests, as many at a time as there are places.

    Args:
        places: `Places`, all of them free.
        requests: Iterator of `Request`s. Asked for another one when a place is
            free for it.

    Yields:
        An `Answer` for each, in the order in which they end.
    """
    newcomer, is_over = None, False
    if places.reads_together:
        waiting = list(itertools.islice(requests, len(places.free)))
        alone = any(x.source is not None for x in waiting)
        if alone or _have_beginnings_in_common(waiting):
            requests = itertools.chain(waiting, requests)
        else:
            for together in _of_similar_length(waiting, places.most_padding):
                places.put_together(together)
    while True:
        budget = None if places.is_empty else _READ
        while places.free and not is_over and (budget is None or budget > 0):
            if newcomer is None:
                newcomer = next(requests, None)
                if newcomer is None:
                    is_over = True
                    break
                places.reader.begin(newcomer.token_ids, newcomer.source)
            before = places.reader.tokens_read
            left = places.reader.go_on(budget)
            if budget is not None:
                budget -= places.reader.tokens_read - before
            if not left:
                places.put(newcomer)
                newcomer = None
        if places.is_empty:
            return
        waits = newcomer is not None and bool(places.free)
        yield from places.step(
            steps=_STEPS if waits else ALL, until_one_ends=not is_over
        )
