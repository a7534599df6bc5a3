"""Many prompts, of any length and number, a few at a time."""

import collections
import collections.abc
import itertools
import typing

import numpy as np
from keras import ops
from tqdm import tqdm

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.loops import sampling
from keras_nlp_cache.generate.loops import speculative
from keras_nlp_cache.generate.loops.answers import padded
from keras_nlp_cache.generate.loops.answers import Request
from keras_nlp_cache.generate.loops.batch import checked
from keras_nlp_cache.generate.loops.batch import draft
from keras_nlp_cache.generate.loops.batch import guesses
from keras_nlp_cache.generate.loops.generation import slots_for
from keras_nlp_cache.generate.loops.places import Places
from keras_nlp_cache.generate.loops.places import run
from keras_nlp_cache.generate.loops.sampling import check_loop
from keras_nlp_cache.generate.options.options import Options
from keras_nlp_cache.generate.options.stop_strings import StopStrings
from keras_nlp_cache.generate.pieces import TextPieces
from keras_nlp_cache.generate.prompts import check_count
from keras_nlp_cache.generate.prompts import check_vocabulary
from keras_nlp_cache.generate.prompts import is_int
from keras_nlp_cache.generate.prompts import stops_of

# How many texts are generated at a time, if nobody says.
BATCH_SIZE = 16
# What a prompt that is a dictionary may say.
_KEYS = ("prompt", "max_new_tokens", "seed")


class Limits(typing.NamedTuple):
    """How long texts may become, and what becomes of prompts that are too long.

    Attributes:
        max_new_tokens: Optional int.
        max_length: Optional int, prompt included.
        truncation: As for `CausalLM.generate()`.
    """

    max_new_tokens: typing.Any = None
    max_length: typing.Any = None
    truncation: str = "error"


class Prompts:
    """Turns prompts of a user's into requests.

    Args:
        lm: A `CausalLM`.
        limits: `Limits`.
        prefix: Optional string or token ids, what every prompt begins with.
        seed: Optional int. What the sampler would be made with.
        copies: int. How many texts to generate for each prompt.
    """

    def __init__(self, lm, limits, prefix=None, seed=None, copies=1):
        self._lm, self._limits = lm, limits
        self._prefix, self._seed, self._copies = prefix, seed, copies
        self._kept = 0
        if lm.preprocessor is not None:
            self._kept = len(reading.starts(lm.preprocessor))

    def requests(self, prompts):
        """Yields the `Request`s of an iterable of prompts."""
        for i, prompt in enumerate(prompts):
            said = {"prompt": prompt}
            if isinstance(prompt, dict):
                said = self._checked(i, prompt)
            token_ids, limit = self._read(i, **said)
            for copy in range(self._copies):
                number = i * self._copies + copy
                if said.get("seed") is None:
                    stream = [number], self._seed
                else:
                    stream = [copy], said["seed"]
                (stream,) = sampling.streams(
                    self._lm.generation_loop.sampler, *stream
                )
                yield Request(number, token_ids, limit, stream)

    @staticmethod
    def _checked(i, prompt):
        unknown = [key for key in prompt if key not in _KEYS]
        if unknown or "prompt" not in prompt:
            raise ValueError(
                f"Expected prompt {i} to be a string, token ids, or a "
                f"dictionary with `prompt` and any of {list(_KEYS[1:])}. "
                f"Received the keys {sorted(map(str, prompt))}."
            )
        for key in _KEYS[1:]:
            value = prompt.get(key)
            least = 1 if key == "max_new_tokens" else 0
            if value is not None and not (is_int(value) and value >= least):
                raise ValueError(
                    f"Expected `{key}` of prompt {i} to be an integer of "
                    f"{least} or more. Received: {value!r}."
                )
        return prompt

    def _read(self, i, prompt, max_new_tokens=None, seed=None):
        """The token ids of a prompt, and how many there may be at most."""
        token_ids = self._token_ids(i, prompt)
        most = self._limits.max_length
        room = self._lm.backbone.max_positions
        if max_new_tokens is None:
            max_new_tokens = self._limits.max_new_tokens
        if most is None and max_new_tokens is None:
            most = getattr(self._lm.preprocessor, "sequence_length", None)
            if most is None:
                raise ValueError(
                    "Expected `max_new_tokens` or `max_length`, for a model "
                    "whose preprocessor does not say how long a text may "
                    "become. Received: None for both."
                )
        if most is None:
            # Room for what is to come, and for what is there.
            most = len(token_ids) + max_new_tokens
            if room is not None and most > room:
                most = room - max_new_tokens
                why = f" to fit the {room} positions that the model learned"
                token_ids = self._cut(i, token_ids, max(most, 1), why)
                most = room
        else:
            token_ids = self._cut(i, token_ids, most)
        if max_new_tokens is not None:
            most = min(most, len(token_ids) + max_new_tokens)
        if room is not None and most > room:
            raise ValueError(
                f"Expected texts to fit the {room} positions that the model "
                f"learned. Received: max_length={self._limits.max_length}. "
                "Lower it."
            )
        return token_ids, most

    def _cut(self, i, token_ids, length, why=" to fit"):
        if len(token_ids) <= length:
            return token_ids
        if self._limits.truncation == "error":
            raise ValueError(
                f"Expected prompts of at most {length} tokens, for them and "
                f"what is generated{why}. Received: prompt {i} of "
                f"{len(token_ids)} tokens. Shorten it, raise the limit, or "
                "have it cut by `truncation`."
            )
        return reading.cut(
            token_ids, length, self._limits.truncation, self._kept
        )

    def _token_ids(self, i, prompt):
        prefix, preprocessor = self._prefix, self._lm.preprocessor
        if isinstance(prompt, str):
            if preprocessor is None:
                raise ValueError(
                    "Expected token ids, since the model has no "
                    f"`preprocessor`. Received: {prompt!r}. Set "
                    "`lm.preprocessor`."
                )
            token_ids = reading.encode(preprocessor, (prefix or "") + prompt)
        else:
            token_ids = _as_ids(i, prompt)
            if prefix is not None:
                token_ids = np.append(_as_ids("`prefix`", prefix), token_ids)
        if not len(token_ids):
            raise ValueError(
                "Expected every prompt to have at least one token. Received: "
                f"none in prompt {i}. Leave it out, or begin with a token."
            )
        check_vocabulary(token_ids, self._lm.backbone)
        return token_ids


def _as_ids(i, prompt):
    array = prompt
    if ops.is_tensor(array):
        array = ops.convert_to_numpy(array)
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"Expected prompt {i} to be a string, token ids in one dimension, "
            f"or a dictionary with `prompt`. Received: {prompt!r}."
        )
    return array.astype("int32")


class Watch:
    """Looks for stop strings in texts while they grow.

    Args:
        lm: A `CausalLM` with a preprocessor.
        strings: Sequence of strings.
    """

    def __init__(self, lm, strings):
        self._detokenize = lm.preprocessor.tokenizer.detokenize
        self._strings, self._texts = strings, {}

    def __call__(self, number, token_ids, given):
        """See `Places`."""
        if number not in self._texts:
            self._texts[number] = (
                TextPieces(self._detokenize),
                StopStrings(self._strings),
                [given, ""],
            )
        pieces, stop, seen = self._texts[number]
        for token_id in token_ids[seen[0] :]:
            seen[0] += 1
            seen[1] += stop.add(pieces.add(int(token_id)))
            if stop.found is not None:
                return seen[0]
        return None

    def text(self, number):
        """What was generated before a stop string, `None` if there is none."""
        if number not in self._texts:
            return None
        _, stop, (_, text) = self._texts.pop(number)
        return text if stop.found is not None else None


class _Queue:
    """Requests that can be looked at before they are taken."""

    def __init__(self, requests):
        self._requests, self._seen = iter(requests), collections.deque()

    def look(self, count):
        """The next requests, as many as there are up to some number."""
        missing = count - len(self._seen)
        self._seen.extend(itertools.islice(self._requests, max(missing, 0)))
        return list(itertools.islice(self._seen, count))

    def take(self, count):
        """Yields the next requests, as many as there are up to some number."""
        while count and self.look(1):
            yield self._seen.popleft()
            count -= 1

    def up_to(self, limit):
        """Yields requests until one wants more tokens than that."""
        while self.look(1) and self._seen[0].limit <= limit:
            yield self._seen.popleft()


def answers(lm, requests, batch, stops, options, watch=None, most=1):
    """Answers requests, some at a time.

    Args:
        lm: A `CausalLM`.
        requests: Iterable of `Request`s.
        batch: int. How many to answer at a time.
        stops: Sequence of ints.
        options: `Options`.
        watch: Optional, as for `Places`.
        most: int. How many tokens a text may have, as far as that is known.

    Yields:
        The `Answer` of each, in the order in which they end.
    """
    loop, queue = lm.generation_loop, _Queue(requests)
    if loop.in_step:
        batch = 1
    while waiting := queue.look(batch):
        # Later ones may want more slots. Then all that are under way end first.
        most = max(most, *(x.limit for x in waiting))
        slots = slots_for(most, lm.backbone.max_positions)
        places = Places(loop, batch, slots, stops, options, watch)
        try:
            yield from run(places, queue.up_to(slots))
        finally:
            places.leave()


def checked_answers(
    lm, requests, batch, stops, options, guesser, count, watch=None
):
    """Answers requests with guesses, some at a time.

    Args:
        lm: A `CausalLM`.
        requests: Iterable of `Request`s.
        batch: int. How many to answer at a time.
        stops: Sequence of ints.
        options: `Options`.
        guesser: A `speculative.Draft` or `Lookup`.
        count: int. How many tokens to guess at a time.
        watch: Optional, as for `Places`.

    Yields:
        The `Answer` of each.
    """
    if lm.generation_loop.in_step or guesser.in_step:
        batch = 1
    queue = _Queue(requests)
    while waiting := list(queue.take(batch)):
        yield from checked(lm, waiting, stops, options, guesser, count, watch)


class Results:
    """What a user gets of answers.

    Args:
        lm: A `CausalLM`.
        strip_prompt: bool. Whether to leave the prompt out.
        watch: Optional `Watch` that looked at the texts.
        options: `Options`.
        return_dict: bool.
    """

    def __init__(self, lm, strip_prompt, watch, options, return_dict):
        self._lm, self._strip_prompt = lm, strip_prompt
        self._watch, self._options = watch, options
        self._return_dict = return_dict

    def of(self, answer):
        """The text of an `Answer`, or a dictionary.

        Without a preprocessor, token ids stand for a text.
        """
        shown = answer.token_ids
        if self._strip_prompt:
            shown = shown[answer.given :]
        text = shown
        if self._lm.preprocessor is not None:
            text = self._text(answer, shown)
        if not self._return_dict:
            return text
        new = answer.token_ids[answer.given :]
        result = {
            "text": text,
            "token_ids": new,
            "prompt_tokens": answer.given,
            "finish_reason": answer.finish_reason,
        }
        if self._lm.preprocessor is None:
            del result["text"]
        if self._options.return_logprobs is not None:
            result["logprobs"] = [
                {
                    "token_id": int(token_id),
                    "logprob": float(logprob),
                    "top_logprobs": [
                        (int(i), float(x)) for i, x in zip(ids, top)
                    ],
                }
                for token_id, logprob, ids, top in zip(new, *answer.logprobs)
            ]
        return result

    def _text(self, answer, shown):
        cut = None
        if self._watch is not None:
            cut = self._watch.text(answer.number)
        if cut is None:
            return self._detokenized(shown)
        if self._strip_prompt:
            return cut
        return self._detokenized(answer.token_ids[: answer.given]) + cut

    def _detokenized(self, token_ids):
        if not len(token_ids):
            return ""
        (text,) = self._lm.preprocessor.generate_postprocess(
            {
                "token_ids": np.asarray(token_ids)[None],
                "padding_mask": np.ones((1, len(token_ids)), "bool"),
            }
        )
        return text


def shown_progress(results, total, progress):
    """The results, with a bar that says how many there are.

    Args:
        results: Iterable.
        total: int, or `None` if nobody knows.
        progress: bool, or `None` for a bar where somebody can see it, and only
            if the work takes a while.
    """
    if total == 1 and progress is None:
        return results
    return tqdm(
        results,
        total=total,
        unit="text",
        disable=None if progress is None else not progress,
        delay=5 if progress is None else 0,
    )


class Call:
    """A call of `CausalLM.generate()` or `generate_many()`.

    Args:
        lm: A `CausalLM`.
        stop_token_ids: As for `CausalLM.generate()`.
        strip_prompt: bool.
        limits: `Limits`.
        prefix: As for `Prompts`.
        seed: As for `Prompts`.
        num_return_sequences: int.
        return_dict: bool.
        options: Dictionary of what `Options` takes.

    Raises:
        ValueError: If something is not what it should be.
    """

    def __init__(
        self,
        lm,
        stop_token_ids,
        strip_prompt,
        limits,
        prefix,
        seed,
        num_return_sequences,
        return_dict,
        options,
    ):
        check_loop(lm)
        if lm.backbone.rows is not None:
            raise ValueError(
                "Expected a model that treats all rows alike, since a prompt "
                "takes the row that is free. Received one with something else "
                f"for each of {lm.backbone.rows} rows. Call `generate()` with "
                "as many prompts and `max_length`."
            )
        reading.check_truncation(limits.truncation)
        check_count("num_return_sequences", num_return_sequences)
        for name in ("max_new_tokens", "max_length"):
            if getattr(limits, name) is not None:
                check_count(name, getattr(limits, name))
        if seed is not None and not is_int(seed):
            raise ValueError(
                f"Expected `seed` to be an integer. Received: {seed!r}."
            )
        self._lm = lm
        tokenizer = getattr(lm.preprocessor, "tokenizer", None)
        self._options = Options(**options).tokenized(tokenizer)
        self._stops = stops_of(lm, stop_token_ids)
        self._watch = None
        if self._options.stop_strings:
            if lm.preprocessor is None:
                raise ValueError(
                    "Expected no `stop_strings` for a model without a "
                    "`preprocessor`, which has no strings. Received: "
                    f"{self._options.stop_strings!r}. Use `stop_token_ids`."
                )
            self._watch = Watch(lm, self._options.stop_strings)
        self._prompts = Prompts(lm, limits, prefix, seed, num_return_sequences)
        self._results = Results(
            lm, strip_prompt, self._watch, self._options, return_dict
        )
        self._most = limits.max_length or 1

    def run(self, prompts, batch_size=None, guesser=None, count=0):
        """Answers prompts.

        Args:
            prompts: Iterable of what `Prompts` takes.
            batch_size: Optional int. How many to answer at a time.
            guesser: Optional `speculative.Draft` or `Lookup`.
            count: int. How many tokens it guesses at a time.

        Returns:
            An iterator of `(number, result)`, in the order in which texts end.

        Raises:
            ValueError: If `batch_size` is no positive integer.
        """
        if batch_size is None:
            batch_size = BATCH_SIZE
        check_count("batch_size", batch_size)
        common = self._lm, self._prompts.requests(prompts), batch_size
        if guesser is None:
            found = answers(
                *common, self._stops, self._options, self._watch, self._most
            )
        else:
            found = checked_answers(
                *common, self._stops, self._options, guesser, count, self._watch
            )
        return ((x.number, self._results.of(x)) for x in found)


def is_asked_for(
    inputs,
    max_new_tokens,
    batch_size,
    prefix,
    seed,
    num_return_sequences,
    prompt_lookup_num_tokens,
    return_dict,
    options,
):
    """Whether a call of `generate()` is one that upstream does not know."""
    return (
        num_return_sequences != 1
        or return_dict
        or bool(options)
        or isinstance(inputs, collections.abc.Iterator)
        or _says_more(inputs)
        or any(
            x is not None
            for x in (
                max_new_tokens,
                batch_size,
                prefix,
                seed,
                prompt_lookup_num_tokens,
            )
        )
    )


def _says_more(inputs):
    """Whether prompts are dictionaries that only this package knows."""
    if isinstance(inputs, (list, tuple)) and inputs:
        inputs = inputs[0]
    return isinstance(inputs, dict) and "prompt" in inputs


def generate(
    lm,
    inputs,
    max_length,
    stop_token_ids,
    strip_prompt,
    truncation,
    assistant,
    max_new_tokens,
    batch_size,
    prefix,
    seed,
    num_return_sequences,
    prompt_lookup_num_tokens,
    return_dict,
    progress,
    options,
):
    """Does what `CausalLM.generate()` says of its further arguments."""
    prompts, is_scalar, as_arrays = _prompts(inputs)
    call = Call(
        lm,
        stop_token_ids,
        strip_prompt,
        Limits(max_new_tokens, max_length, truncation),
        prefix,
        seed,
        num_return_sequences,
        return_dict,
        options,
    )
    total = None
    if hasattr(prompts, "__len__"):
        total = len(prompts) * num_return_sequences
        if batch_size is None:
            batch_size = min(BATCH_SIZE, max(total, 1))
    guesser, count = _guesser(lm, assistant, prompt_lookup_num_tokens)
    results = dict(
        shown_progress(
            call.run(prompts, batch_size, guesser, count), total, progress
        )
    )
    if not results:
        raise ValueError(
            f"Expected `inputs` to hold at least one prompt. Received: {inputs}"
        )
    results = [results[number] for number in sorted(results)]
    if as_arrays and not return_dict:
        return _as_arrays(results)
    if is_scalar and num_return_sequences == 1:
        return results[0]
    return results


def _guesser(lm, assistant, lookup):
    """What guesses tokens, if something is to, and how many at a time."""
    if lookup is None:
        return draft(lm, assistant), guesses(lm)
    check_count("prompt_lookup_num_tokens", lookup)
    if assistant is not None:
        raise ValueError(
            "Expected one that guesses tokens. Received both an "
            "`assistant_model` and `prompt_lookup_num_tokens`."
        )
    return speculative.Lookup(), lookup


def _prompts(inputs):
    """The prompts that a user passed.

    Returns:
        `(prompts, is_scalar, as_arrays)`: an iterable of prompts, whether it
        is a single one, and whether the result is to be a dictionary of arrays.
    """
    if isinstance(inputs, str):
        return [inputs], True, False
    if isinstance(inputs, dict) and "prompt" in inputs:
        return [inputs], True, False
    if isinstance(inputs, dict):
        token_ids, mask = (
            np.asarray(ops.convert_to_numpy(inputs[name]))
            for name in ("token_ids", "padding_mask")
        )
        mask = mask.astype(bool)
        return [row[kept] for row, kept in zip(token_ids, mask)], False, True
    if hasattr(inputs, "as_numpy_iterator"):
        return _of_dataset(inputs), False, False
    texts = reading.texts(inputs)
    if texts is not None:
        return texts, getattr(inputs, "shape", None) == (), False
    if hasattr(inputs, "__len__") and len(inputs) and is_int(inputs[0]):
        return [inputs], True, False
    return inputs, False, False


def _of_dataset(dataset):
    """Yields the strings of a `tf.data.Dataset`, batched or not."""
    for batch in dataset.as_numpy_iterator():
        for prompt in batch if getattr(batch, "ndim", 0) else [batch]:
            yield prompt.decode() if isinstance(prompt, bytes) else prompt


def _as_arrays(rows):
    """Rows of token ids, padded at their end, as upstream returns them."""
    token_ids, mask = padded(rows)
    return {"token_ids": token_ids, "padding_mask": mask}
