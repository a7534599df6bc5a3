"""What a decoder block that takes a `LayerCache` says of its outputs."""

import keras
from keras import tree


def first_argument(args, kwargs):
    """The sequence, all that upstream's layers agree to take first.

    They name it `query`, `hidden_states`, `decoder_sequence` or `x`, and some
    are called by keyword.
    """
    return args[0] if args else next(iter(kwargs.values()))


class CachedBlock:
    """Mixin for decoder blocks that hand a `LayerCache` to their attention.

    Attributes:
        cache_argument: Name of the `call()` argument that takes the cache.
        padding_argument: Name of the `call()` argument that takes the padding
            mask.
        attention_name: Name of the attribute that holds the attention layer,
            one that `AttendsThroughCache`.
    """

    cache_argument = "self_attention_cache"
    padding_argument = "decoder_padding_mask"
    attention_name = "_self_attention_layer"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, autocast=False, **kwargs)

    @property
    def key_value_shape(self):
        """`(key_value_heads, head_dim)` of the keys and of the values."""
        return getattr(self, self.attention_name).key_value_shape

    @property
    def window(self):
        """How many positions a query sees, `None` for all before it."""
        return getattr(self, self.attention_name).window

    def __call__(self, *args, **kwargs):
        # Keras casts all float arguments to the compute dtype. Hidden states
        # should be, a cache should not: it may have been made in another
        # dtype on request, and casting it would copy it at every step.
        cache = kwargs.pop(self.cache_argument, None)
        args, kwargs = tree.map_structure(
            lambda x: self.dtype_policy.convert_input(
                x, True, self.input_dtype
            ),
            (args, kwargs),
        )
        if cache is not None:
            kwargs[self.cache_argument] = cache
        return super().__call__(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """Hidden states alone, or with the cache if one came in."""
        cache = kwargs.get(self.cache_argument)
        hidden_states = keras.KerasTensor(
            first_argument(args, kwargs).shape, dtype=self.compute_dtype
        )
        if not isinstance(cache, tuple):
            return hidden_states
        pair = tuple(
            None if x is None else keras.KerasTensor(x.shape, dtype=x.dtype)
            for x in cache[:2]
        )
        return hidden_states, pair
