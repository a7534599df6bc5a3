"""What a decoder block says of its outputs when it has a cache."""

import keras
from keras import tree


def first_argument(args, kwargs):
    """The sequence, all that upstream's layers agree to take first.

    They name it `query`, `hidden_states`, `decoder_sequence` or `x`, and some
    are called by keyword.
    """
    return args[0] if args else next(iter(kwargs.values()))


class CachedBlock:
    """Mixin for decoder blocks whose layers have entries in a cache.

    Attributes:
        remembering: List of the layers inside that remember, in an order that
            stays. Each has a `key_value_shape` and a `window`.
        entries_argument: Name of the `call()` argument that takes a tuple with
            a `LayerCache` for each of these. With it, the block returns a pair:
            its outputs, and a tuple of what became of the entries.
        padding_argument: Name of the `call()` argument that takes the padding
            mask, `None` if there is none.
    """

    entries_argument = "entries"
    padding_argument = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, autocast=False, **kwargs)

    def __call__(self, *args, **kwargs):
        # Keras casts all float arguments to the compute dtype. Hidden states
        # should be, a cache should not: it may have been made in another
        # dtype on request, and casting it would copy it at every step.
        entries = kwargs.pop(self.entries_argument, None)
        args, kwargs = tree.map_structure(
            lambda x: self.dtype_policy.convert_input(
                x, True, self.input_dtype
            ),
            (args, kwargs),
        )
        if entries is not None:
            kwargs[self.entries_argument] = entries
        return super().__call__(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """What the block returns, with its entries if such came in."""
        entries = kwargs.pop(self.entries_argument, None)
        outputs = self.compute_outputs_spec(*args, **kwargs)
        if entries is None:
            return outputs
        return outputs, tree.map_structure(
            lambda x: (
                None if x is None else keras.KerasTensor(x.shape, x.dtype)
            ),
            tuple((entry.key, entry.value) for entry in entries),
        )

    def compute_outputs_spec(self, *args, **kwargs):
        """What the block returns beside its entries: hidden states."""
        return keras.KerasTensor(
            first_argument(args, kwargs).shape, dtype=self.compute_dtype
        )
