"""Attention to the keys and values of an earlier layer.

Where several layers attend to the same keys and values, one of them computes
these and has an entry in the cache. It returns what it reads beside its output,
the graph hands that on, and the others read it and have no entry.
"""

from keras import ops

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.shared_keys import SharedKeys
from keras_nlp_cache.layers import block_call


class SharingAttention(CachedAttention):
    """Mixin for an attention layer that shares keys and values with others.

    Upstream's layer takes them as an argument, and returns them with its
    output, as one tensor `(B, 2, T, key_value_heads, head_dim)`. So they are
    handed on where upstream's code attends, and as `SharedKeys` where ours
    does.

    Attributes:
        borrows: bool. Whether the layer reads what another one returned.
            `project()` then returns `None` for key and value.
        shared_argument: Name of the argument.
        heads_first: bool. Whether that tensor is `(B, 2, key_value_heads, T,
            head_dim)`.
    """

    returns_cache = True
    shared_argument = "shared_kv"
    heads_first = False

    def on_specialized(self):
        super().on_specialized()
        # What it is given of a cache stays in the dtype of that.
        self.autocast = False

    def answer(self, x, cache, kwargs):
        query, key, value, *rest = self.project(x, cache.positions)
        if self.borrows:
            shared = self._as_read(kwargs[self.shared_argument])
            entry, cache = (None, None), cache._replace(key=shared.kept)
        else:
            entry, key, value = cache.update(
                ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2)
            )
            shared = SharedKeys(key, value, entry[0])
        output = self.attend_to(
            x, cache, query, shared.key, shared.value, *rest
        )
        if block_call.entry_of(self) is None:
            shared = self._as_upstream(shared)
        return self.returned_with(output, shared), entry

    def returned_with(self, output, shared):
        """What upstream's layer returns with keys and values."""
        return output, shared

    def _all_at_once(self, x, attention_mask, positions=None, **kwargs):
        cache = super()._all_at_once(x, attention_mask, kwargs.get("cache"))
        # The mask is all there is to see, windows included.
        cache = cache._replace(
            mask=LayerCache.without_memory(attention_mask, x.shape[1]).mask
        )
        return (
            cache
            if positions is None
            else cache._replace(positions=ops.cast(positions, "int32"))
        )

    def _as_read(self, shared):
        """`SharedKeys`, of what our code or upstream's hands on."""
        if isinstance(shared, SharedKeys):
            return shared
        return SharedKeys(*(self._turned(shared[:, i]) for i in range(2)))

    def _as_upstream(self, shared):
        """The tensor that upstream's code hands on."""
        return ops.stack(
            [self._turned(x) for x in (shared.key, shared.value)], axis=1
        )

    def _turned(self, x):
        return x if self.heads_first else ops.swapaxes(x, 1, 2)
