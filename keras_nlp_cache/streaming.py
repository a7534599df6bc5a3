"""Text as it is generated."""

import numpy as np
from keras import ops

from keras_nlp_cache.loops.generation import slots_for

# What `detokenize()` puts in place of bytes that are not yet a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def stream(lm, prompt, max_new_tokens=256, stop_token_ids="auto"):
    """Generates text after a prompt, piece by piece.

    Args:
        lm: A `CausalLM` with a preprocessor and a sampler that picks one token
            at a time.
        prompt: str.
        max_new_tokens: int. Stop after that many tokens.
        stop_token_ids: `None`, `"auto"` or a tuple of token ids to stop at, as
            in `CausalLM.generate()`.

    Yields:
        `(piece, count)`: the text that follows from the tokens so far, always
        whole characters and possibly empty, and the number of tokens
        generated up to now.

    Raises:
        ValueError: If the model has no preprocessor, the prompt has no tokens,
            `max_new_tokens` is not positive, or prompt and new tokens together
            need more positions than the model learned.

    Example:
    ```python
    lm.compile(sampler="greedy")
    for piece, count in stream(lm, "the fox", max_new_tokens=8):
        print(piece, end="", flush=True)
    ```

    Reference:
        https://github.com/keras-team/keras-hub/issues/976
    """
    if lm.preprocessor is None:
        raise ValueError(
            "Expected a model with a `preprocessor`, to turn text into tokens "
            "and back. Received: preprocessor=None."
        )
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f"Expected `prompt` to be a string that is not empty. Received: "
            f"{prompt!r}."
        )
    token_ids = _tokenize(lm.preprocessor, prompt)
    detokenize = lm.preprocessor.tokenizer.detokenize
    stop = _stop_token_ids(lm.preprocessor.tokenizer, stop_token_ids)
    generated, shown = [], ""
    for token_id in stream_tokens(lm, token_ids, max_new_tokens):
        if token_id in stop:
            break
        generated.append(token_id)
        text = detokenize(generated)
        if text.endswith(_INCOMPLETE):
            yield "", len(generated)
        else:
            yield text[len(shown) :], len(generated)
            shown = text
    if generated and detokenize(generated) != shown:
        yield detokenize(generated)[len(shown) :], len(generated)


def stream_tokens(lm, token_ids, max_new_tokens):
    """Generates token ids after a prompt, one by one.

    Args:
        lm: A `CausalLM`, as for `stream()`.
        token_ids: 1D integer array, the prompt.
        max_new_tokens: int. How many tokens to generate.

    Yields:
        Token ids, as ints.
    """
    length = len(token_ids)
    if length == 0:
        raise ValueError(
            "Expected a prompt of at least one token. Received an empty one."
        )
    if max_new_tokens < 1:
        raise ValueError(
            "Expected `max_new_tokens` to be 1 or more. Received: "
            f"{max_new_tokens}."
        )
    limit = lm.backbone.max_positions
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"Expected prompt and new tokens to fit the {limit} positions "
            f"that the model learned. Received: {length} + {max_new_tokens}. "
            "Shorten the prompt or lower `max_new_tokens`."
        )
    loop = lm.generation_loop
    prompt = np.asarray(token_ids, "int32")[None]
    generation = loop.prefill(
        prompt, np.ones_like(prompt), slots_for(length + max_new_tokens, limit)
    )
    steps = loop.steps(generation, length + max_new_tokens)
    for end, generation in enumerate(steps, start=length):
        yield int(ops.convert_to_numpy(generation.token_ids)[0, end])


def _tokenize(preprocessor, prompt):
    # A token is a byte or more, and a preprocessor adds two at most.
    x = preprocessor.generate_preprocess(
        [prompt], sequence_length=len(prompt.encode()) + 2
    )
    x = {name: ops.convert_to_numpy(value) for name, value in x.items()}
    return x["token_ids"][x["padding_mask"].astype(bool)]


def _stop_token_ids(tokenizer, stop_token_ids):
    if stop_token_ids is None:
        return ()
    if stop_token_ids != "auto":
        return tuple(stop_token_ids)
    names = ("end_token_id", "end_token2_id")
    return tuple(
        getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)
    )
