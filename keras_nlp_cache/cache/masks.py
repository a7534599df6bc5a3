"""Additive masks: what a query may attend to.

They are added to the logits of attention, and to each other.
"""

from keras import ops

from keras_nlp_cache.cache.slots import slot_distance

# Added to the logits of slots that may not be attended. Large enough to vanish
# in a softmax, small enough that several of them can be summed in float32.
MASKED = -1e9


def causal_mask(index, length, max_length, window=None):
    """Additive mask that hides the future, and the past beyond a window.

    Args:
        index: int scalar. The slot of the first query.
        length: int. The number of queries, `T`.
        max_length: int. The number of slots, `S`.
        window: Optional int. A query sees itself and the `window - 1` slots
            before it. Defaults to `None`, all of them.

    Returns:
        A float32 tensor `(T, S)`: 0 where attended, `MASKED` elsewhere.
    """
    distance = slot_distance(index, length, max_length)
    seen = distance >= 0
    if window is not None:
        seen = ops.logical_and(seen, distance < window)
    return additive(seen)


def additive(seen):
    """Turns a boolean mask (`True` where attended) into an additive one."""
    return ops.where(
        ops.cast(seen, "bool"),
        ops.cast(0.0, "float32"),
        ops.cast(MASKED, "float32"),
    )
