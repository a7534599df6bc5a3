"""What options do to the logits of one step."""

from keras import ops

from keras_nlp_cache.generate.options.bad_words import without_bad_words
from keras_nlp_cache.generate.options.counting import counts


def process(
    structure, values, logits, token_ids, lengths, prompt_lengths, temperature
):
    """Applies options to what a model says of the next tokens.

    In the order of transformers, with what it does not have in between:

    1. `logit_bias` is added to the model's logits,
    2. `repetition_penalty`, of prompt and generated tokens,
    3. `presence_penalty` and `frequency_penalty`, of generated tokens,
    4. `bad_words` are left out,
    5. the `logits_processor` is called,
    6. `min_p` leaves out what is unlikely at the temperature.

    The temperature, and what top-k and top-p samplers leave out, is the
    sampler's, and comes after: logits are returned as they are before it. Left
    out is what has the logit -inf. No row depends on another.

    All of it is done by operations of the backend, for any values: it can be
    traced.

    Args:
        structure: A `Structure`.
        values: From `Options.values()`, as arrays or tensors.
        logits: Floating `(B, V)`, as from the model.
        token_ids: Integers `(B, S)`, from the first slot of each row on. What
            they are after the text is not looked at.
        lengths: Integers `(B,)`. How many tokens the text of each row has, 1 or
            more.
        prompt_lengths: Integers `(B,)`. How many of them are its prompt.
        temperature: float or scalar tensor. That of the sampler.

    Returns:
        float32 `(B, V)`. The logits as they came in if no option changes them.

    Raises:
        ValueError: If the `logits_processor` returns something else than
            logits.
    """
    if not structure.processes:
        return logits
    logits = ops.cast(logits, "float32")
    token_ids = ops.cast(token_ids, "int32")
    lengths = ops.cast(lengths, "int32")
    values = {name: ops.convert_to_tensor(x) for name, x in values.items()}
    slots = ops.arange(token_ids.shape[1], dtype="int32")[None]
    written = slots < lengths[:, None]
    if structure.logit_bias:
        logits = logits + values["logit_bias"]
    if structure.repetition_penalty:
        seen = counts(logits, token_ids, written) > 0
        logits = _with_repetition_penalty(
            logits, seen, values["repetition_penalty"]
        )
    if structure.counts:
        prompt_lengths = ops.cast(prompt_lengths, "int32")
        generated = ops.logical_and(written, slots >= prompt_lengths[:, None])
        times = counts(logits, token_ids, generated)
        logits = (
            logits
            - values["presence_penalty"] * ops.cast(times > 0, "float32")
            - values["frequency_penalty"] * times
        )
    if structure.bad_words:
        logits = without_bad_words(
            logits,
            values["bad_words"],
            values["bad_word_lengths"],
            token_ids,
            lengths,
        )
    if structure.logits_processor:
        logits = _called(
            structure.logits_processor.function,
            ops.where(written, token_ids, ops.zeros_like(token_ids)),
            logits,
            lengths,
        )
    if structure.min_p:
        logits = _with_min_p(logits, values["log_min_p"], temperature)
    return logits


def _with_repetition_penalty(logits, seen, penalty):
    penalized = ops.where(logits < 0, logits * penalty, logits / penalty)
    return ops.where(seen, penalized, logits)


def _with_min_p(logits, log_min_p, temperature):
    """Leaves out tokens that have too small a share of the best one's."""
    # Of probabilities, this is the ratio, whatever they are divided by.
    distance = log_min_p * ops.cast(temperature, "float32")
    best = ops.max(logits, axis=1, keepdims=True)
    return ops.where(logits < best + distance, -float("inf"), logits)


def _called(function, token_ids, logits, lengths):
    """What a user's function makes of the logits."""
    shape = tuple(logits.shape)
    result = function(token_ids, logits, lengths)
    if not ops.is_tensor(result) or tuple(result.shape) != shape:
        what = getattr(result, "shape", None)
        what = type(result).__name__ if what is None else f"shape {what}"
        raise ValueError(
            "Expected `logits_processor` to return logits, a tensor of shape "
            f"{shape}. Received: {what}."
        )
    return ops.cast(result, "float32")
