"""Text that is shown while it is generated from what an encoder has read."""

import numpy as np
from keras import ops

from keras_nlp_cache.generate.loops.generation import slots_for
from keras_nlp_cache.generate.loops.sampling import check_loop
from keras_nlp_cache.generate.many.requests import Limits
from keras_nlp_cache.generate.many.source_prompts import SourcePrompts
from keras_nlp_cache.generate.options.options import Options
from keras_nlp_cache.generate.options.stop_strings import StopStrings
from keras_nlp_cache.generate.pieces import TextPieces
from keras_nlp_cache.generate.prompts import check_count
from keras_nlp_cache.generate.prompts import stops_of
from keras_nlp_cache.generate.reading import check_truncation
from keras_nlp_cache.generate.session import check_postprocess


def stream(lm, prompt, max_new_tokens, stop_token_ids, truncation, options):
    """Does what `Seq2SeqLM.stream()` says.

    Args:
        lm: A `Seq2SeqLM`.
        prompt: As for `Seq2SeqLM.stream()`, like all that follow.
        max_new_tokens: int.
        stop_token_ids: Collection of ints, or `"auto"`.
        truncation: str.
        options: Dictionary of what `Options` takes.
    """
    if lm.preprocessor is None:
        raise ValueError(
            "Expected a model with a `preprocessor`, to turn tokens into text. "
            "Received: preprocessor=None. Set `lm.preprocessor`."
        )
    check_loop(lm)
    check_postprocess(lm.preprocessor)
    check_truncation(truncation)
    check_count("max_new_tokens", max_new_tokens)
    stops = stops_of(lm, stop_token_ids)
    options = Options(**options).tokenized(lm.preprocessor.tokenizer)
    if options.return_logprobs is not None:
        raise ValueError(
            "Expected no `return_logprobs` of a text that is streamed. "
            f"Received: {options.return_logprobs}. Call `generate()`."
        )
    limits = Limits(max_new_tokens, None, truncation)
    (request,) = SourcePrompts(lm, limits).requests([prompt])
    return _text(lm, request, stops, options)


def _text(lm, request, stops, options):
    pieces = TextPieces(lm.preprocessor.tokenizer.detokenize)
    until = StopStrings(options.stop_strings or ())
    for token_id in _tokens(lm, request, stops, options):
        if token_id in stops:
            break
        yield until.add(pieces.add(token_id))
        if until.found is not None:
            return
    rest = until.add(pieces.rest()) + until.rest()
    if rest:
        yield rest


def _tokens(lm, request, stops, options):
    """Yields token ids after a prompt, as ints."""
    loop, seen = lm.generation_loop, len(request.token_ids)
    reached = loop.prefill(
        request.token_ids[None],
        np.ones((1, seen), "bool"),
        slots_for(request.limit, lm.backbone.max_positions),
        source={name: x[None] for name, x in request.source.items()},
    )
    try:
        steps = loop.steps(reached, request.limit, stops, options)
        for reached in steps:
            tokens = ops.convert_to_numpy(reached.token_ids)[0]
            last = int(ops.convert_to_numpy(reached.index)[0])
            for token_id in tokens[seen : last + 1]:
                yield int(token_id)
            seen = last + 1
    finally:
        # Also if nobody wants to read on.
        loop.release(reached)
