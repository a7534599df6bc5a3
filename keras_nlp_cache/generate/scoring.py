"""What a task says of token ids, with a say in what each block returns."""

import keras


def score(
    lm,
    token_ids,
    padding_mask,
    scoring_mode,
    layer_intercept_fn,
    target_ids,
):
    """Does what `CausalLM.score()` says.

    Args:
        lm: A `CausalLM`.
        token_ids: As for `CausalLM.score()`, as are the others.
        padding_mask: See there.
        scoring_mode: See there.
        layer_intercept_fn: See there.
        target_ids: See there.

    Returns:
        Logits `(B, T, vocabulary_size)`, or the loss of each token `(B, T)`.

    Raises:
        ValueError: If `scoring_mode` is neither `"logits"` nor `"loss"`, or is
            the latter without `target_ids`.
    """
    if scoring_mode not in ("logits", "loss"):
        raise ValueError(
            'Expected `scoring_mode` to be "logits" or "loss". Received: '
            f"{scoring_mode!r}."
        )
    if scoring_mode == "loss" and target_ids is None:
        raise ValueError(
            "Expected `target_ids`, the token ids to compare with, with "
            'scoring_mode="loss". Received: target_ids=None.'
        )
    embeddings = lm.embeddings_layer

    def change(site, x):
        if site.block is not None:
            return intercept(x, site.block)
        return intercept(x, -1) if site.layer is embeddings else x

    def intercept(x, index):
        if layer_intercept_fn is None:
            return x
        y = layer_intercept_fn(x, index)
        if getattr(y, "shape", None) != x.shape:
            raise ValueError(
                "Expected `layer_intercept_fn` to return hidden states of "
                f"the shape that it got, {tuple(x.shape)}. Received: "
                f"{getattr(y, 'shape', y)!r}, for layer {index}."
            )
        return y

    inputs = token_ids
    if not isinstance(inputs, dict):
        inputs = {"token_ids": token_ids}
    hidden_states = lm.backbone.watched(
        {"padding_mask": padding_mask, **inputs}, change
    )
    logits = lm._logits(hidden_states)
    if scoring_mode == "logits":
        return logits
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="none"
    )
    return loss(target_ids, logits)
