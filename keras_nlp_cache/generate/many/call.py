"""A call that answers many prompts."""

import collections.abc

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.loops import speculative
from keras_nlp_cache.generate.loops.batch import draft
from keras_nlp_cache.generate.loops.batch import guesses
from keras_nlp_cache.generate.loops.sampling import check_loop
from keras_nlp_cache.generate.many.answering import answers
from keras_nlp_cache.generate.many.answering import answers_after_source
from keras_nlp_cache.generate.many.answering import checked_answers
from keras_nlp_cache.generate.many.image_prompts import are_with_images
from keras_nlp_cache.generate.many.image_prompts import ImagePrompts
from keras_nlp_cache.generate.many.image_prompts import prompts_with_images
from keras_nlp_cache.generate.many.requests import Limits
from keras_nlp_cache.generate.many.requests import Prompts
from keras_nlp_cache.generate.many.requests import prompts_in
from keras_nlp_cache.generate.many.results import as_arrays
from keras_nlp_cache.generate.many.results import Results
from keras_nlp_cache.generate.many.results import shown_progress
from keras_nlp_cache.generate.many.source_prompts import prompts_with_source
from keras_nlp_cache.generate.many.source_prompts import SourcePrompts
from keras_nlp_cache.generate.many.watch import Watch
from keras_nlp_cache.generate.options.options import Options
from keras_nlp_cache.generate.prompts import check_count
from keras_nlp_cache.generate.prompts import check_guesses
from keras_nlp_cache.generate.prompts import is_int
from keras_nlp_cache.generate.prompts import stops_of

# How many texts are generated at a time, if nobody says.
BATCH_SIZE = 16


class Call:
    """A call of `CausalLM.generate()` or `generate_many()`.

    Args:
        lm: A `CausalLM`.
        max_new_tokens: As for `Limits`.
        max_length: As for `Limits`.
        truncation: As for `Limits`.
        stop_token_ids: As for `CausalLM.generate()`.
        strip_prompt: bool.
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
        *,
        max_new_tokens,
        max_length,
        truncation,
        stop_token_ids,
        strip_prompt,
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
        reading.check_truncation(truncation)
        check_count("num_return_sequences", num_return_sequences)
        limits = Limits(max_new_tokens, max_length, truncation)
        for name in ("max_new_tokens", "max_length"):
            if getattr(limits, name) is not None:
                check_count(name, getattr(limits, name))
        if seed is not None and not is_int(seed):
            raise ValueError(
                f"Expected `seed` to be an integer. Received: {seed!r}."
            )
        self._lm = lm
        tokenizer = getattr(lm.preprocessor, "tokenizer", None)
        self._options = Options.of(options).tokenized(tokenizer)
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
        self._has_source = lm.backbone.roles.source is not None
        prompts = ImagePrompts if lm.sees_in_turns else Prompts
        if self._has_source:
            prompts = SourcePrompts
        self._prompts = prompts(lm, limits, prefix, seed, num_return_sequences)
        self._results = Results(
            lm, strip_prompt, self._watch, self._options, return_dict
        )
        self._most = max_length or 1
        self._copies = num_return_sequences

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
        if self._has_source:
            found = answers_after_source(
                *common, self._stops, self._options, guesser, count, self._watch
            )
        elif guesser is None:
            found = answers(
                *common, self._stops, self._options, self._watch, self._most
            )
        else:
            found = checked_answers(
                *common, self._stops, self._options, guesser, count, self._watch
            )
        return ((x.number, self._results.of(x)) for x in found)

    def count(self, prompts):
        """How many texts there will be, `None` if nobody knows."""
        if not hasattr(prompts, "__len__"):
            return None
        return len(prompts) * self._copies


def is_asked_for(inputs, num_return_sequences, return_dict, options, **further):
    """Whether a call of `generate()` is one that upstream does not know."""
    return (
        num_return_sequences != 1
        or return_dict
        or bool(options)
        or any(x is not None for x in further.values())
        or isinstance(inputs, collections.abc.Iterator)
        or _says_more(inputs)
    )


def _says_more(inputs):
    """Whether prompts are dictionaries that only this package knows."""
    if isinstance(inputs, (list, tuple)) and inputs:
        inputs = inputs[0]
    return isinstance(inputs, dict) and "prompt" in inputs


def generate(
    lm,
    inputs,
    *,
    assistant,
    batch_size,
    prompt_lookup_num_tokens,
    progress,
    **kwargs,
):
    """Does what `CausalLM.generate()` says of its further arguments.

    Args:
        lm: A `CausalLM`.
        inputs: As for `CausalLM.generate()`, like all that follow.
        assistant: Optional.
        batch_size: Optional int.
        prompt_lookup_num_tokens: Optional int.
        progress: bool, or `None`.
        **kwargs: Further arguments, as for `Call`.
    """
    roles = lm.backbone.roles
    if are_with_images(lm, inputs):
        prompts, is_scalar, are_arrays = prompts_with_images(
            inputs, lm.preprocessor
        )
    elif roles.source is None:
        prompts, is_scalar, are_arrays = prompts_in(inputs)
    else:
        prompts, is_scalar, are_arrays = prompts_with_source(inputs, roles)
    call = Call(lm, **kwargs)
    total = call.count(prompts)
    if total is not None and batch_size is None:
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
    if are_arrays and not kwargs["return_dict"]:
        return as_arrays(results, roles)
    if is_scalar and kwargs["num_return_sequences"] == 1:
        return results[0]
    return results


def generate_many(lm, prompts, *, batch_size, progress, **kwargs):
    """Does what `CausalLM.generate_many()` says."""
    call = Call(lm, **kwargs)
    results = call.run(prompts, batch_size)
    return iter(shown_progress(results, call.count(prompts), progress))


def _guesser(lm, assistant, lookup):
    """What guesses tokens, if something is to, and how many at a time."""
    if lookup is None:
        return draft(lm, assistant), guesses(lm)
    check_count("prompt_lookup_num_tokens", lookup)
    check_guesses(lm)
    if assistant is not None:
        raise ValueError(
            "Expected one that guesses tokens. Received both an "
            "`assistant_model` and `prompt_lookup_num_tokens`."
        )
    return speculative.Lookup(), lookup
