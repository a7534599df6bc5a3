"""A text that grows turn by turn, with the cache that belongs to it."""

import contextlib

import numpy as np
from keras import ops

from keras_nlp_cache.cache.kept import can_go_back
from keras_nlp_cache.cache.moving import filled_slots
from keras_nlp_cache.cache.moving import put_in
from keras_nlp_cache.cache.moving import take_out
from keras_nlp_cache.generate import conversation
from keras_nlp_cache.generate import session_file
from keras_nlp_cache.generate.loops.generation import drawn
from keras_nlp_cache.generate.loops.generation import slots_for
from keras_nlp_cache.generate.loops.sampling import check_loop
from keras_nlp_cache.generate.options.options import Options
from keras_nlp_cache.generate.pieces import pieces_of
from keras_nlp_cache.generate.prompts import check_continuation
from keras_nlp_cache.generate.prompts import check_count
from keras_nlp_cache.generate.prompts import is_int
from keras_nlp_cache.generate.prompts import stops_of
from keras_nlp_cache.generate.reading import check_truncation
from keras_nlp_cache.generate.reading import cut
from keras_nlp_cache.generate.reading import encode
from keras_nlp_cache.generate.reading import starts
from keras_nlp_cache.generate.session_images import SessionImages


class Session:
    """A text that a model goes on with, and remembers.

    `CausalLM.start_session()` makes one. What was sent and what was answered
    stays in the key/value cache, so that the next turn costs no more than what
    is new in it. What `send()` adds is what the model sees; `chat()` puts each
    turn into the chat template of the model.

    The cache belongs to the weights that it was computed with. After training
    the model, start a new session.

    Args:
        lm: A `CausalLM` with a preprocessor, compiled with a sampler that picks
            one token at a time.

    Attributes:
        token_ids: int32 array `(T,)`, all tokens up to now.
        prefilled_tokens: int. How many tokens the model has read so far that
            it did not generate itself, over all turns.
        conversation: A `Conversation`, what was said by `chat()`.

    Raises:
        ValueError: If the model has no preprocessor.

    Example:
    ```python
    session = lm.start_session()
    session.send("the fox", max_new_tokens=4)
    other = session.fork()
    session.send("jumps", max_new_tokens=4)
    session.rewind(2)
    other.save("fox.safetensors")
    ```

    Reference:
        https://github.com/keras-team/keras-hub/issues/976
    """

    # How many tokens cannot be rewound.
    fewest_tokens = 0
    # What an encoder reads before the text, a batch of one.
    _source = None

    def __init__(self, lm):
        if lm.preprocessor is None:
            raise ValueError(
                "Expected a model with a `preprocessor`, to turn text into "
                "tokens and back. Received: preprocessor=None. Set "
                "`lm.preprocessor`."
            )
        self.lm = lm
        self.token_ids = np.zeros((0,), "int32")
        self.prefilled_tokens = 0
        self.conversation = conversation.Conversation()
        self._images = SessionImages()
        # The cache, how many slots of it are filled, and whose it is.
        self._cache, self._filled, self._loop = None, 0, None
        self._slots = 0
        # How many slots were ever written, rewound or not.
        self._mark = 0
        self._turn = 0

    @property
    def text(self):
        """All that was sent and answered, as a string."""
        if not len(self.token_ids):
            return ""
        return self.lm.preprocessor.tokenizer.detokenize(self.token_ids)

    @property
    def messages(self):
        """What was said by `chat()`, a list of dictionaries.

        May be changed or assigned. The next turn reads what is then new.
        """
        return self.conversation.messages

    @messages.setter
    def messages(self, messages):
        self.conversation.messages = conversation.checked(messages)

    @property
    def changes(self):
        """How often the session was changed, but for an answer that grows."""
        return self._turn

    def send(
        self,
        text,
        max_new_tokens=256,
        stop_token_ids="auto",
        truncation="error",
        images=None,
        **options,
    ):
        """Adds to the text and has the model go on with it.

        Args:
            text: str. What to add. May be empty at first, where the
                preprocessor adds a start token to go on from.
            max_new_tokens: int. Stop after that many tokens.
            stop_token_ids: `None`, `"auto"` or a collection of token ids to
                stop at, as in `CausalLM.generate()`. The stop token becomes
                part of the session, and not of the answer.
            truncation: What becomes of a text that, with what was said before
                and the new tokens, needs more positions than the model learned:
                `"error"`, or what of it fills them, `"left"` for its last
                tokens after the start token or `"right"` for its first.
            images: Optional array `(height, width, 3)` or list of such, one
                for each placeholder in `text`, for a model that reads images
                in its text. Each is seen once: later turns find in the cache
                what became of it.
            **options: As for `CausalLM.generate()`, such as `stop_strings`, but
                for `return_logprobs`. A penalty counts all that was said before
                as the prompt.

        Returns:
            str, the answer.

        Raises:
            ValueError: If `text` is not a string or adds no token,
                `max_new_tokens` not a positive integer, or the text gets longer
                than the positions that the model learned, and is not to be cut
                or there is no room at all; or if there are other images than
                the text has places for, or the model does not read them so.
        """
        return "".join(
            self.stream(
                text,
                max_new_tokens,
                stop_token_ids,
                truncation,
                images,
                **options,
            )
        )

    def stream(
        self,
        text,
        max_new_tokens=256,
        stop_token_ids="auto",
        truncation="error",
        images=None,
        **options,
    ):
        """Does what `send()` does, and yields the answer as it is produced.

        May be left early. What was yielded until then stays in the session.

        Returns:
            An iterator with one string for each token: the text that has
            become certain with it, of whole characters, possibly empty. If the
            answer ends within a character, what there is of it comes last.

        Raises:
            ValueError: As `send()`, when it is called.
            RuntimeError: From the iterator, if the session changed after the
                iterator was made.
        """
        check_loop(self.lm)
        check_postprocess(self.lm.preprocessor)
        check_truncation(truncation)
        token_ids, start, images = self._tokenize(text, images)
        check_count("max_new_tokens", max_new_tokens)
        stop = stops_of(self.lm, stop_token_ids)
        limit = self.lm.backbone.max_positions
        if limit is not None:
            before = len(self.token_ids)
            room = limit - before - max_new_tokens
            keeps_all = truncation == "error" or images
            if len(token_ids) > room and (keeps_all or room < 1):
                raise ValueError(
                    f"Expected text and new tokens to fit the {limit} "
                    "positions that the model learned. Received: "
                    f"{before + len(token_ids)} tokens of text, "
                    f"max_new_tokens={max_new_tokens}. Shorten the text or "
                    "have it cut by `truncation`, rewind, or lower "
                    "`max_new_tokens`."
                )
            token_ids = cut(token_ids, room, truncation, kept=start)
        options = self._options(options)
        self._turn += 1
        return self._stream(
            token_ids, max_new_tokens, stop, options, self._turn, images
        )

    def _options(self, options):
        """What a user said of an answer, as `Options`."""
        if isinstance(options, Options):
            return options
        if "images" in options:
            raise ValueError(
                "Expected messages of text for a chat template. Received "
                "`images`, too. Pass them to `send()` or `stream()`, with a "
                "`text` in the form of the template."
            )
        options = Options.of(options).tokenized(self.lm.preprocessor.tokenizer)
        if options.return_logprobs is not None:
            raise ValueError(
                "Expected no `return_logprobs` of a text that is streamed. "
                f"Received: {options.return_logprobs}. Call `generate()`."
            )
        return options

    def chat(
        self,
        message,
        max_new_tokens=256,
        stop_token_ids="auto",
        template_options=None,
        **options,
    ):
        """Says something, and has the model answer as its chat template says.

        All messages are put into the template, and what the session has not
        read of that is read: as a rule, no more than the message. Where a
        template writes earlier messages otherwise by now, such as without what
        the model thought before it answered, it is read again from there on.

        Special tokens that a user spells out, such as `"<|im_end|>"`, are read
        letter by letter, so that nobody ends a turn but the template. That
        holds for messages of all roles but `"system"` and `"developer"`, and
        in those of `"assistant"` for the tokens that end a turn.

        Args:
            message: str, what the user says. Or a message as a dictionary with
                `"role"` and `"content"`, or a list of these, such as one of the
                system and one of the user.
            max_new_tokens: int. Stop after that many tokens.
            stop_token_ids: `None`, `"auto"` or a collection of token ids to
                stop at. `"auto"` are those of `CausalLM.generate()` and the
                one that the template ends an answer with.
            template_options: Optional dictionary of what else the template is
                to know, such as `{"enable_thinking": False}`.
            **options: As for `send()`.

        Returns:
            str, the answer, without tokens of the template.

        Raises:
            ValueError: If the model has no chat template, or it refuses the
                messages; if these are not what they should be; if text was
                sent to the session otherwise; or if the conversation gets
                longer than the positions that the model learned.

        Example:
        ```python
        lm.chat_template = (
            "{% for m in messages %}{{ m.content }} {% endfor %}"
        )
        session = lm.start_session()
        session.chat("the fox", max_new_tokens=4)
        session.chat("the dog", max_new_tokens=4)
        session.rewind_turn()
        ```
        """
        return "".join(
            self.stream_chat(
                message,
                max_new_tokens,
                stop_token_ids,
                template_options,
                **options,
            )
        )

    def stream_chat(
        self,
        message,
        max_new_tokens=256,
        stop_token_ids="auto",
        template_options=None,
        **options,
    ):
        """Does what `chat()` does, and yields the answer as it is produced.

        May be left early. What was yielded until then is the answer.

        Returns:
            An iterator as that of `stream()`.

        Raises:
            ValueError: As `chat()`, when it is called.
            RuntimeError: As `stream()`.
        """
        check_loop(self.lm)
        check_postprocess(self.lm.preprocessor)
        return conversation.stream_turn(
            self,
            message,
            max_new_tokens,
            stop_token_ids,
            template_options,
            self._options(options),
        )

    def rewind_turn(self, count=1):
        """Forgets the last turns of a chat, each what a user said and on.

        Args:
            count: int. How many, at most all. What the system said before the
                first stays.

        Raises:
            ValueError: If there are not as many, or `count` is not an integer
                of 0 or more; or if the cache policy did not keep what the
                tokens before these have seen.
        """
        conversation.rewind_turns(self, count)

    def stream_tokens(
        self,
        token_ids,
        max_new_tokens=256,
        stop_token_ids=(),
        options=None,
        images=None,
    ):
        """Does what `stream()` does, with token ids for text.

        Args:
            token_ids: 1D integer array. What to add, if only to go on.
            max_new_tokens: int, as for `send()`.
            stop_token_ids: As for `send()`.
            options: Optional `Options`. Stop strings are the business of who
                makes text of tokens.
            images: Optional `SessionImages`, which of these tokens are of
                images.

        Yields:
            Token ids, as ints.

        Raises:
            ValueError: If `token_ids` are not that, or not of the vocabulary,
                or there is not one to begin with; or as `send()`.
        """
        check_count("max_new_tokens", max_new_tokens)
        stops = stops_of(self.lm, stop_token_ids)
        token_ids = check_continuation(
            token_ids, self.lm.backbone, begun=len(self.token_ids) > 0
        )
        images = self._images.added(
            images or SessionImages(), len(self.token_ids)
        )
        token_ids = np.append(self.token_ids, token_ids)
        end = len(token_ids) + max_new_tokens
        loop = steps = None
        while True:
            check_loop(self.lm)
            if loop is not self.lm.generation_loop:
                # At first, and where the sampler, say, is another one by now.
                loop = self.lm.generation_loop
                generation = self._prefill(
                    loop, token_ids, end, images, stops, options
                )
                steps = loop.steps(generation, end, stops, options)
            # While a step is under way there is no cache to go on with.
            cache, self._cache = self._cache, None
            generation = next(steps, None)
            if generation is None:
                self._cache = cache
                return
            self._cache = generation.cache
            tokens = ops.convert_to_numpy(generation.token_ids)[0]
            last = int(ops.convert_to_numpy(generation.index)[0])
            loop.advance(drawn(generation.stream))
            tokens = tokens[len(self.token_ids) : last + 1]
            for token_id in tokens:
                # An answer may be left between two tokens of a step.
                self._filled = len(self.token_ids)
                self._mark = max(self._mark, self._filled)
                self.token_ids = np.append(self.token_ids, token_id)
                yield int(token_id)
            if token_id in stops:
                return
            token_ids = self.token_ids

    def _stream(self, token_ids, max_new_tokens, stop, options, turn, images):
        tokens = self.stream_tokens(
            token_ids, max_new_tokens, stop, options, images
        )
        return pieces_of(
            self._while_unchanged(tokens, turn),
            self.lm.preprocessor.tokenizer.detokenize,
            stop,
            options.stop_strings or (),
        )

    def _while_unchanged(self, tokens, turn):
        while True:
            if turn != self._turn:
                raise RuntimeError(
                    "Expected the session to be left alone while an answer is "
                    "streamed. It was changed in between. Start another "
                    "stream, or `fork()` the session first."
                )
            token_id = next(tokens, None)
            if token_id is None:
                return
            yield token_id

    def _prefill(self, loop, token_ids, end, images, *decoding):
        """Reads what is new, with room for a text of `end` tokens.

        `images` are all of that text, and `decoding` are the further arguments
        of the decode steps that follow.
        """
        backbone = self.lm.backbone
        # A chunk that would end after the last slot begins earlier, where
        # tokens may be of images, which are read with these alone.
        end += loop.chunk if images else 0
        slots = slots_for(end, backbone.max_positions)
        # Until it is done there is no cache to go on with.
        cache, self._cache = self._cache, None
        start = 0
        if cache is not None:
            start, slots = self._filled, max(slots, self._slots)
            if loop is not self._loop or slots > self._slots:
                tokens = take_out(cache, start, self._mark)
                cache = self._restored(loop, tokens, slots)
        source = None
        if images.since(start):
            source = self.lm.source_in_turn(images, token_ids, start)
        preparing = contextlib.nullcontext()
        if cache is None:
            # Which the cache holds afterwards.
            source = source or self._source
            preparing = loop.preparing(1, slots, *decoding)
        with preparing:
            generation = loop.prefill(
                token_ids[None],
                np.ones((1, len(token_ids)), "bool"),
                slots,
                cache=cache,
                start=start,
                source=source,
            )
        self.prefilled_tokens += max(0, len(token_ids) - 1 - start)
        self.token_ids, self._filled = token_ids, len(token_ids) - 1
        self._images = images
        self._mark = max(self._mark, self._filled)
        self._cache, self._loop, self._slots = generation.cache, loop, slots
        return generation

    def _restored(self, loop, tokens, slots):
        """A cache that holds tokens, for a loop of this model."""
        arrays, self._mark = put_in(
            self.lm.backbone,
            tokens,
            self._filled,
            slots,
            self.lm.cache_dtype,
            self.lm.cache_policy,
        )
        return loop.restore_cache(arrays)

    def _empty(self):
        """A session of the same model, and of the same source."""
        return Session(self.lm)

    def fork(self):
        """Returns a copy that goes its own way from here."""
        other = self._empty()
        other.token_ids = self.token_ids.copy()
        other.prefilled_tokens = self.prefilled_tokens
        other.conversation = self.conversation.copy()
        other._images = self._images
        if self._cache is not None:
            loop = other._loop = self.lm.generation_loop
            other._filled, other._slots = self._filled, self._slots
            tokens = take_out(self._cache, self._filled, self._mark)
            other._cache = other._restored(loop, tokens, self._slots)
        return other

    def rewind(self, count):
        """Forgets the last tokens.

        Args:
            count: int. How many, at most all.

        Raises:
            ValueError: If there are not as many, or `count` is not an integer
                of 0 or more; if the cache policy did not keep what the tokens
                before these have seen; or if the last token left would be one
                of an image.
        """
        total = len(self.token_ids)
        most = total - self.fewest_tokens
        if not is_int(count) or not 0 <= count <= most:
            but = ", but for the first" if self.fewest_tokens else ""
            raise ValueError(
                f"Expected `count` to be an integer from 0 to {most}, the "
                f"tokens of this session{but}. Received: count={count!r}."
            )
        # The last token that is left will be read once more.
        filled = min(self._filled, max(total - count - 1, 0))
        if self._cache is not None and filled < self._filled:
            if not can_go_back(self._cache, self._mark, filled):
                raise ValueError(
                    f"Expected a cache that remembers what the first "
                    f"{total - count} tokens have seen. Received one of the "
                    f"policy {self.lm.cache_policy}, in which later tokens "
                    "took their places, or of layers with a state, which "
                    f"cannot go back. Rewind less than {count} tokens, or all, "
                    "or start another session."
                )
        self._images.check_end(total - count, f"count={count}")
        self._turn += 1
        self.token_ids = self.token_ids[: total - count]
        self._images = self._images.before(total - count)
        self._filled = min(self._filled, len(self.token_ids))

    def reachable(self, count):
        """How many of the first `count` tokens there is no need to read again.

        Less than all where the text cannot go back so far, but can begin anew.
        """
        filled = max(count - 1, 0)
        if self._cache is None or filled >= self._filled:
            return count
        if can_go_back(self._cache, self._mark, filled):
            return count
        return 0 if can_go_back(self._cache, self._mark, 0) else count

    def save(self, path):
        """Writes the session to a file, or leaves an older file as it was.

        Args:
            path: str or path that ends in `.safetensors`.

        Raises:
            ValueError: If `path` ends otherwise.
            OSError: If the file cannot be written.
        """
        arrays = None
        if self._cache is not None:
            arrays = take_out(self._cache, self._filled, self._mark)
        session_file.write(
            path,
            self.lm.backbone,
            self.token_ids,
            arrays,
            self._images,
            self.conversation.to_json() if self.messages else None,
            self._source,
        )

    def load(self, path):
        """Replaces this session by one that `save()` wrote.

        Args:
            path: str or path.

        Raises:
            ValueError: If the file is damaged, not of a session, or of another
                model. The session is then what it was.
            OSError: If the file cannot be read.
        """
        token_ids, tokens, images, said, source = session_file.read(
            path, self.lm.backbone, conversation.Conversation.from_json
        )
        new = self._empty()
        new.token_ids, new._images = token_ids, images
        new._source = source
        new.conversation = said or conversation.Conversation()
        if tokens is not None:
            new._filled = filled_slots(tokens)
            new._slots = slots_for(
                max(new._filled, 1), self.lm.backbone.max_positions
            )
            new._loop = self.lm.generation_loop
            try:
                new._cache = new._restored(new._loop, tokens, new._slots)
            except (TypeError, ValueError) as e:
                raise ValueError(
                    f"Expected {str(path)!r} to hold what the cache policy "
                    f"{self.lm.cache_policy} keeps. Received a session of "
                    f"another one: {e}"
                ) from e
        turn = self._turn + 1
        vars(self).update(vars(new), _turn=turn)

    def _tokenize(self, text, images):
        """Token ids to add, and how many of them every text begins with.

        And `SessionImages`, which of them are of images.
        """
        begun = len(self.token_ids) > 0
        if not isinstance(text, str) or (begun and not text):
            raise ValueError(
                "Expected `text` to be a string, and in a session that has "
                f"begun one that is not empty. Received: {text!r}."
            )
        preprocessor = self.lm.preprocessor
        start = starts(preprocessor)
        seen = SessionImages()
        if images is None or not len(images):
            token_ids = encode(preprocessor, text)
        else:
            token_ids, seen = self.lm.see(text, images)
        if begun:
            # A text starts once.
            token_ids = token_ids[len(start) :]
            seen = seen._replace(places=seen.places - len(start))
            start = ()
        if not len(token_ids):
            raise ValueError(
                "Expected `text` to hold at least one token. Received: "
                f"{text!r}, of which the tokenizer makes none, and a "
                "preprocessor that adds no start token."
            )
        return token_ids, len(start), seen


def check_postprocess(preprocessor):
    """Refuses what makes text of all tokens in a way that nobody knows."""
    method = type(preprocessor).generate_postprocess
    if not method.__module__.startswith(("keras_hub.", "keras_nlp_cache.")):
        raise ValueError(
            "Expected a preprocessor whose text can be shown piece by piece. "
            f"Received: a {type(preprocessor).__name__} with a "
            "`generate_postprocess` of its own, which streams and sessions "
            "would pass by. Call `generate()`."
        )
