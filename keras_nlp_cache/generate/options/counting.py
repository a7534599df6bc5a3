"""How often each token of the vocabulary is among some."""

import keras
from keras import ops


def counts(logits, token_ids, counted):
    """Counts tokens, row by row.

    It takes no more room than the logits: no token is compared with all of the
    vocabulary.

    Args:
        logits: float32 `(B, V)`. Their shape is that of the counts.
        token_ids: int32 `(B, S)`.
        counted: bool `(B, S)`. Which of them count.

    Returns:
        float32 `(B, V)`.
    """
    # Zeros of an argument, as those of a shape would be kept with a captured
    # function, as large as all logits.
    zeros, ones = ops.zeros_like(logits), ops.cast(counted, logits.dtype)
    if keras.config.backend() == "torch":
        # Keras would write to a copy in place.
        return zeros.scatter_add(1, ops.cast(token_ids, "int64"), ones)
    rows = ops.arange(ops.shape(token_ids)[0], dtype="int32")[:, None]
    rows = ops.broadcast_to(rows, ops.shape(token_ids))
    places = ops.reshape(ops.stack([rows, token_ids], axis=-1), (-1, 2))
    return ops.scatter_update(
        zeros, places, ops.reshape(ones, (-1,)), reduction="add"
    )
