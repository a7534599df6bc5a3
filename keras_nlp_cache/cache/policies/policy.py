"""What all policies have in common."""

import dataclasses

from keras import ops

from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.policies.encoded import Encoded


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which tokens a cache keeps, and how.

    Args:
        storage: `None` for tensors of the dtype of the cache, or `"int8"` for
            eight bits a number and a scale for each token and head, about a
            quarter of float32.
    """

    storage: str | None = None

    def __post_init__(self):
        if self.storage not in (None, "int8"):
            raise ValueError(
                'Expected `storage` to be `None` or "int8". Received: '
                f"{self.storage!r}."
            )

    def make(self, shape, dtype, window, zeros=ops.zeros):
        """Makes what is kept of the keys or values of a layer, empty.

        Args:
            shape: `(B, key_value_heads, max_length, head_dim)`.
            dtype: The floating dtype of the cache.
            window: Optional int. How many tokens a query of the layer sees,
                its own included.
            zeros: Function from a shape and a dtype to a tensor. Its numbers
                may be anything, if the loop that asks writes before it reads.
        """
        raise NotImplementedError

    def make_encoded(self, shape, dtype, zeros=ops.zeros):
        """Makes what is kept of keys or values of an encoder, empty.

        Args:
            shape: `(B, key_value_heads, 0, head_dim)`.
            dtype: The floating dtype of the cache.
            zeros: As for `make()`.
        """
        return Encoded.empty(self.store(shape, dtype, zeros), zeros)

    def check(self, backbone):
        """Raises a `ValueError` if it is not for a model."""

    def store(self, shape, dtype, zeros):
        """Places for tokens, empty."""
        if self.storage == "int8":
            values = zeros(shape, "int8")
            return Int8(values, zeros((*shape[:-1], 1), "float32"))
        return zeros(shape, dtype)
