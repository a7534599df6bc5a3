"""Every token is kept."""

import dataclasses

from keras import ops

from keras_nlp_cache.cache.policies.policy import Policy


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Keeps every token, each in the place of its slot.

    Args:
        storage: See `Policy`.
    """

    def make(self, shape, dtype, window, zeros=ops.zeros):
        return self.store(shape, dtype, zeros)
