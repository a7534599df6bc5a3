"""How likely the model found the tokens that were picked, and others."""

from keras import ops


def top_logprobs(logits, chosen, k):
    """Log probabilities of the tokens that were picked and of likely ones.

    They are the model's own: of its logits at a temperature of 1, before any
    option and whatever the sampler leaves out, as in vLLM.

    Args:
        logits: Floating `(B, V)`, as from the model.
        chosen: Integers `(B,)`, the tokens that were picked.
        k: int. How many likely tokens to tell, 0 or more.

    Returns:
        A tuple `(logprob, top_ids, top_logprobs)`: float32 `(B,)` of the tokens
        that were picked, int32 `(B, k)` and float32 `(B, k)` of the likely
        ones, the likeliest first.
    """
    logits = ops.cast(logits, "float32")
    total = ops.logsumexp(logits, axis=1, keepdims=True)
    chosen = ops.cast(chosen, "int32")[:, None]
    logprob = ops.take_along_axis(logits, chosen, axis=1) - total
    top, top_ids = ops.top_k(logits, k)
    return logprob[:, 0], ops.cast(top_ids, "int32"), top - total
