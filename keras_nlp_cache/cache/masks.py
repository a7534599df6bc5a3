"""Additive masks: what a query may attend to.

They are added to the logits of attention, and to each other.
"""

from keras import ops

# Added to the logits of slots that may not be attended. Large enough to vanish
# in a softmax, small enough that several of them can be summed in float32.
MASKED = -1e9


def causal_mask(distance, window=None):
    """Additive mask that hides the future, and the past beyond a window.

    Args:
        distance: int tensor of any shape. How many slots each slot is behind
            each query. See `slot_distance()`.
        window: Optional int. A query sees itself and the `window - 1` slots
            before it. Defaults to `None`, all of them.

    Returns:
        A float32 tensor of that shape: 0 where attended, `MASKED` elsewhere.
    """
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
