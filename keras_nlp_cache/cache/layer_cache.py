"""What a key/value cache is, and the one verb that changes it.

A *cache* is a tuple with one entry per call of a layer that remembers, a
`(key, value)` pair. How each half is kept is the business of a *policy*, see
`policies/`. By default it is a tensor of shape `(batch, key_value_heads,
max_length, head_dim)`. Heads come before slots so that the slots of one head
lie next to each other in memory: on XLA:CPU that makes a decode step three
times as fast as the `(batch, max_length, heads, head_dim)` layout.
"""

import typing

from keras import ops

from keras_nlp_cache.cache.kept import read_slots
from keras_nlp_cache.cache.kept import update
from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.masks import causal_mask
from keras_nlp_cache.cache.slots import slot_distance
from keras_nlp_cache.cache.slots import slots


class LayerCache(typing.NamedTuple):
    """One layer's share of a call: its entry, and what all layers share.

    Every field may be `None`. Without a key and a value there is nothing to
    remember. Without a mask there is nothing of ours to do at all, and
    upstream's own code runs.

    Args:
        key: What is kept of the keys of `S` slots, of `key_value_heads` heads
            of `head_dim` numbers.
        value: What is kept of the values.
        index: int32, `()` or `(B,)`. The slot at which this call starts to
            write, in all rows or in each.
        positions: int32 tensor `(B or 1, T)`. Where each token stands in the
            text, for rotary and learned position embeddings.
        mask: float32 tensor `(B or 1, 1, T, S)`, added to the logits. If the
            layer has a window, the mask hides what is beyond it. For a layer
            with a state, bool `(B, T)`: which tokens are no padding.
        distance: int32 tensor `(B or 1, T, S)`. How many positions each slot
            stands behind each token, for layers that ask for it.
        source: Tensor `(B, S, source_dim)`. What the keys and values are of,
            where they are not of the tokens. `None` if it was read before.
    """

    key: typing.Any = None
    value: typing.Any = None
    index: typing.Any = None
    positions: typing.Any = None
    mask: typing.Any = None
    distance: typing.Any = None
    source: typing.Any = None

    @property
    def in_use(self):
        return self.mask is not None or self.positions is not None

    @classmethod
    def of_pair(cls, pair, index, length, window=None):
        """Completes a bare `(key, value)` pair for a layer called by hand."""
        if index is None:
            raise ValueError(
                "Expected the slot of the first token, the argument that ends "
                "in `cache_update_index`, with a cache. Received: None. Pass "
                "0 to fill an empty cache."
            )
        key, value = pair
        distance = slot_distance(index, length, read_slots(key, index, length))
        return cls(
            key=key,
            value=value,
            index=ops.convert_to_tensor(index, "int32"),
            positions=slots(index, length),
            mask=causal_mask(distance, window)[:, None],
            distance=distance,
        )

    @classmethod
    def without_memory(cls, attention_mask, length, window=None):
        """What a layer needs that sees all of a text at once.

        Args:
            attention_mask: Tensor `(B, T, T)`, 0 where not attended.
            length: int, `T`.
            window: Optional int. How many positions a token sees, itself and
                those before it, or those that follow if it sees such.
        """
        distance = slot_distance(0, length, slots(0, length))
        mask = additive(attention_mask)[:, None]
        if window is not None:
            near = ops.absolute(distance) < window
            mask = mask + additive(near)[:, None]
        return cls(positions=slots(0, length), mask=mask, distance=distance)

    def update(self, key, value):
        """Remembers the keys and values of this call's tokens.

        Args:
            key: Tensor `(B, key_value_heads, T, head_dim)`.
            value: Tensor `(B, key_value_heads, T, head_dim)`.

        Returns:
            `(entry, key, value)`: the pair of what is kept now, and what
            attention is to read. Without an entry, that is a pair of `None`,
            and the new keys and values.
        """
        if self.key is None:
            return (None, None), key, value
        new_key, key = update(self.key, key, self.index)
        new_value, value = update(self.value, value, self.index)
        return (new_key, new_value), key, value
