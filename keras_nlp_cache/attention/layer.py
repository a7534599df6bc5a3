"""Attention layers that remember: project, rotate, update, attend, project.

`CachedAttention.attend_through()` reads in that order. What it takes is found
under the names that upstream's layers have for it. A model family subclasses
`CachedAttention` together with upstream's layer and states only what it does or
calls otherwise.
"""

import keras
from keras import ops

from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.attention.sinks import nearer_sinks
from keras_nlp_cache.cache import kept
from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.int8 import turn
from keras_nlp_cache.cache.int8 import turn_back
from keras_nlp_cache.cache.int8 import widened
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.cache.slots import slots
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.remembering import Remembers
from keras_nlp_cache.layers.specializing import Specialized

# What upstream's attention layers call what they are made of.
_PROJECTIONS = {
    "query": ("_query_dense", "query_dense", "query_projector"),
    "key": ("_key_dense", "key_dense", "key_projector"),
    "value": ("_value_dense", "value_dense", "value_projector"),
    "output": ("_output_dense", "output_dense", "output_projector"),
}
_ROTARY = ("rotary_embedding_layer", "rope_layer")
_ROTARY_SIZE = ("rotary_dim", "_rotary_dim")
_QUERY_NORM = ("_query_dense_layer_norm", "query_norm")
_KEY_NORM = ("_key_dense_layer_norm", "key_norm")
_SCALE = ("_inv_norm_factor", "inv_norm_factor")
_SOFT_CAP = ("logit_soft_cap",)
_HAS_WINDOW = ("use_sliding_window_attention",)
_WINDOW = ("sliding_window", "_sliding_window", "sliding_window_size")


class CachedAttention(Specialized, Remembers):
    """Mixin that gives an upstream attention layer an entry in the cache.

    Placed before the upstream class in the bases of a layer of the same name.
    All that it needs to know it finds under the names that upstream's layers
    agree on, or says when the backbone is constructed what it looked for.

    Attributes that a family may set:
        key_value_shape: `(key_value_heads, head_dim)` of the keys and of the
            values.
        project: Method `(x, positions) -> (query, key, value)`, from
            `(B, T, hidden_dim)` and int32 `(B or 1, T)`. Rotates query and key
            if the family does. The query is `(B, T, query_heads, head_dim)`,
            key and value are `(B, T, key_value_heads, head_dim)`. What it
            returns beyond these, `merge_heads()` takes, too.
        scale: float. Multiplies the attention logits.
        soft_cap: Optional float. See `attend()`.
        window: Optional int. How many positions a query sees, its own
            included.
        sees_spans: bool. Whether tokens of an image see what follows them in
            it, if they do in any layer.
        weights_dropout: Optional callable, applied to the attention weights.
        sink: Optional tensor `(query_heads,)`. See `attend()`.
        logits_bias: Optional method from how far behind the query each slot
            is, int32 `(B or 1, T, S)`, to the `bias` of `attend()`. Goes with
            `wants_distance`.
        merge_heads: Method from `(B, T, query_heads, head_dim)` to
            `(B, T, hidden_dim)`.
        projections: Dictionary from `"query"`, `"key"`, `"value"` and
            `"output"` to the attributes that hold the layers which project to
            these, and from all heads to the output.
        merges_heads: bool. Whether the output is projected from heads that
            were put in a row, `(B, T, query_heads * head_dim)`.
        dropout_of_weights: Name of the attribute that holds the dropout of the
            attention weights, `None` without such.
        dropout_of_heads: Name of the attribute that holds the dropout of what
            heads return, before it is projected, `None` without such.
        drops_output: bool. Whether there is a dropout behind the output
            projection, inside of the layer. What surgery puts between the two
            then is not behind the attention.
        returns_cache: bool. Whether upstream's layer returns a pair even
            without a cache.

    Attributes that surgery sets:
        replaced_attention: Layer that is called in place of `attend()`, with
            its arguments by name.
        stand_in: Layer that is called on `x` in place of all that comes before
            the output projection. The cache stays as it is.
    """

    sink = None
    logits_bias = None
    sees_spans = True
    merges_heads = False
    dropout_of_weights = None
    dropout_of_heads = None
    drops_output = False
    returns_cache = False

    # === What it is made of ===

    def on_specialized(self):
        """Raises a `ValueError` if something is not where it was looked for."""
        for attribute in self.projections.values():
            if getattr(self, attribute, None) is None:
                self._fail_to_find("a projection", (attribute,))
        for value, what in (
            (self.key_value_shape, "heads and their size"),
            ((self.scale,), "the scale of its logits"),
        ):
            if not all(isinstance(x, int | float) for x in value):
                self._fail_to_find(what, (), f"{what} to be {value}")
        own = ("sink", "logits_bias")
        if self._trainable_variables and all(
            getattr(self, name) is None for name in own
        ):
            self._fail_to_find("said what its own weights are", own)
        self._check_layers()
        for layer in self._flatten_layers(include_self=False):
            if layer.weights and not layer.built:
                # Its weights are there, but upstream builds it when it is first
                # called, and Keras quantizes no model before.
                layer.built = True

    def _check_layers(self):
        """Raises a `ValueError` for layers inside that would not be called."""
        names = (self.dropout_of_heads, self.dropout_of_weights)
        known = [getattr(self, name) for name in names if name is not None]
        projects_as_usual = type(self).project is CachedAttention.project
        if projects_as_usual:
            known += [self.projection(part) for part in self.projections]
            known += [self._find(_QUERY_NORM), self._find(_KEY_NORM)]
            if type(self).rotate is CachedAttention.rotate:
                known.append(self.rotary())
        for layer in self._layers:
            if any(layer is x for x in known):
                continue
            if isinstance(layer, keras.layers.Dropout):
                self._fail_to_find(
                    f"said what layer {layer.name!r} is",
                    ("dropout_of_weights", "dropout_of_heads"),
                )
            if not projects_as_usual:
                continue
            if "Rotary" in type(layer).__name__ and layer is not self.rotary():
                self._fail_to_find("its rotary embedding", _ROTARY)
            if layer.weights:
                self._fail_to_find(
                    f"said what layer {layer.name!r} is",
                    (*self.projections, *_QUERY_NORM, *_KEY_NORM),
                )

    def _fail_to_find(self, what, names, found="none of these"):
        raise ValueError(
            f"Expected {type(self).__name__!r}, an attention layer of "
            f"keras_hub, to have {what}"
            f"{' as one of ' if names else ''}{', '.join(names)}. Received: "
            f"{found}, in {self.name!r}. The class in keras_hub is another one "
            "than this package was written for: its module in "
            "`keras_nlp_cache/models/` has to say what differs."
        )

    def _find(self, names):
        """The first of some attributes that there is, or `None`."""
        for name in names:
            if getattr(self, name, None) is not None:
                return getattr(self, name)
        return None

    @property
    def projections(self):
        found = {}
        for part, names in _PROJECTIONS.items():
            found[part] = next((x for x in names if hasattr(self, x)), None)
            if found[part] is None:
                self._fail_to_find(f"its {part} projection", names)
        return found

    def projection(self, name):
        """The layer that projects to query, key, value or output."""
        return getattr(self, self.projections[name])

    @property
    def key_value_shape(self):
        shape = self.projection("key").compute_output_shape((None, None, None))
        return tuple(shape[2:])

    # No property: Keras lays files out by attributes that are layers.
    def rotary(self):
        """The layer that rotates queries and keys, or `None`."""
        return self._find(_ROTARY)

    @property
    def scale(self):
        scale = self._find(_SCALE)
        if scale is None:
            self._fail_to_find("the scale of its logits", _SCALE)
        return scale

    @property
    def soft_cap(self):
        return self._find(_SOFT_CAP)

    @property
    def window(self):
        if self._find(_HAS_WINDOW) is False:
            return None
        return self._find(_WINDOW) or None

    @property
    def weights_dropout(self):
        return self._active_dropout(self.dropout_of_weights)

    def _active_dropout(self, name):
        layer = None if name is None else getattr(self, name)
        return layer if layer is not None and layer.rate else None

    def compute_query_shape(self, input_shape):
        """`(B, T, query_heads, head_dim)`, from the shape of what comes in."""
        return tuple(self.projection("query").compute_output_shape(input_shape))

    # === What it does ===

    def attend_through(self, x, cache, bias=None):
        """Attends to what a cache remembers, and to the new tokens.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            cache: A `LayerCache` in use.
            bias: Optional, the `bias` of `attend()`. Defaults to what
                `logits_bias()` says.

        Returns:
            `(output, (key, value))`, with a pair of `None` if the cache has
            no memory.
        """
        query, key, value, *rest = self.project(x, cache.positions)
        entry, key, value = cache.update(
            ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2)
        )
        return self.attend_to(x, cache, query, key, value, *rest, bias=bias), (
            entry
        )

    def attend_to(self, x, cache, query, key, value, *rest, bias=None):
        """Attends to keys and values that a cache said are to be read.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            cache: A `LayerCache` in use, as it was before that.
            query: As `project()` returns it.
            key: What is to be read, `(B, key_value_heads, S, head_dim)`, a
                tensor or an `Int8`.
            value: Like it.
            *rest: What else `project()` returned.
            bias: As for `attend_through()`.

        Returns:
            A tensor `(B, T, hidden_dim)`.
        """
        if hasattr(self, "replaced_attention"):
            key, value = widened(key, x.dtype), widened(value, x.dtype)
        elif isinstance(key, Int8):
            query = turn(query)
        # Few families have these, and few functions know them.
        further = {}
        if self.sink is not None:
            further["sink"] = self.sink
        if bias is not None:
            further["bias"] = bias
        elif self.logits_bias is not None:
            further["bias"] = self.logits_bias(cache.distance)
        elif self.rotary() is not None:
            bias = self._nearer_sinks(x, query, key, cache)
            if bias is not None:
                further["bias"] = bias
        function = getattr(self, "replaced_attention", None) or (
            access().attention(cache, ops.shape(x)[1]) or attend
        )
        x = function(
            query=query,
            key=key,
            value=value,
            mask=cache.mask,
            scale=self.scale,
            soft_cap=self.soft_cap,
            dropout=self.weights_dropout,
            **further,
        )
        if isinstance(value, Int8):
            x = turn_back(x)
        return self.merge_heads(x, *rest)

    def _nearer_sinks(self, x, query, key, cache):
        """The bias that makes the first tokens seem nearer, if they are to."""
        nearer = kept.nearer(cache.key, cache.index, x.shape[1])
        if nearer is None:
            return None
        slot = slots(cache.index, x.shape[1])
        if len(cache.positions.shape) > 2:
            nearer = nearer[:, :, None]  # In a grid, on all axes.
        moved, *_ = self.project(x, cache.positions - nearer)
        if isinstance(key, Int8):
            moved = turn(moved)
        return nearer_sinks(
            query, moved, key, cache.key, slot, self.scale, self.soft_cap
        )

    def attend_across(self, x, cache):
        """Attends to what an encoder returned.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            cache: A `LayerCache` in use. If it has a `source`, that is read,
                and else what is kept of one.

        Returns:
            `(output, (key, value))`, with what is kept now.
        """
        entry = self.read_across(cache)
        query, key, value = self.heads("query", x), *(y.stored for y in entry)
        is_int8 = isinstance(key, Int8)
        x = attend(
            query=turn(query) if is_int8 else query,
            key=key,
            value=value,
            mask=cache.mask,
            scale=self.scale,
            soft_cap=self.soft_cap,
            dropout=self.weights_dropout,
        )
        return self.merge_heads(turn_back(x) if is_int8 else x), entry

    def read_across(self, cache):
        """What is kept of what an encoder returned, once that is read.

        Args:
            cache: A `LayerCache`, as for `attend_across()`.

        Returns:
            `(key, value)`.
        """
        entry = cache.key, cache.value
        if cache.source is None:
            return entry
        return tuple(
            kept.read(ops.swapaxes(x, 1, 2), cache.mask)
            for kept, x in zip(entry, self.project_source(cache.source))
        )

    def project_source(self, x):
        """Keys and values of what an encoder returned, `(B, S, heads, dim)`."""
        return self.heads("key", x), self.heads("value", x)

    def heads(self, name, x):
        """Projects to queries, keys or values, `(B, T, heads, head_dim)`.

        Args:
            name: `"query"`, `"key"` or `"value"`.
            x: Tensor `(B, T, hidden_dim)`.
        """
        return self.projection(name)(x)

    def project(self, x, positions):
        query, key, value = (
            self.heads(name, x) for name in ("query", "key", "value")
        )
        if self._find(_QUERY_NORM) is not None:
            query = self._find(_QUERY_NORM)(query)
            key = self._find(_KEY_NORM)(key)
        return self.rotate(query, positions), self.rotate(key, positions), value

    def rotate(self, x, positions):
        """Turns queries or keys `(B, T, heads, head_dim)` by their positions.

        Args:
            x: Tensor.
            positions: int32 tensor `(B or 1, T)`.
        """
        if self.rotary() is None:
            return x
        size = self._find(_ROTARY_SIZE) or x.shape[-1]
        if size == x.shape[-1]:
            return self.rotary()(x, positions=positions)
        turned = self.rotary()(x[..., :size], positions=positions)
        return ops.concatenate((turned, x[..., size:]), axis=-1)

    def merge_heads(self, x):
        """Projects `(B, T, query_heads, head_dim)` to `(B, T, hidden_dim)`."""
        dropout = self._active_dropout(self.dropout_of_heads)
        if dropout is not None:
            x = dropout(x)
        if self.merges_heads:
            x = ops.reshape(x, (*ops.shape(x)[:2], -1))
        return access().project(self.projection("output"), x)

    def call(self, *args, **kwargs):
        """Attends through the cache of the call under way, or as upstream.

        Returns:
            As upstream does.
        """
        x = first_argument(args, kwargs)
        entry = block_call.entry_of(self)
        if hasattr(self, "stand_in"):
            output = self.projection("output")(self.stand_in(x))
        elif entry is not None:
            output, pair = self.answer(x, entry, kwargs)
            block_call.current().updated[id(self)] = pair
        elif hasattr(self, "replaced_attention"):
            output, _ = self.answer(x, self._all_at_once(x, **kwargs), kwargs)
        else:
            return super().call(*args, **kwargs)
        return output if isinstance(output, tuple) else self.returned(output)

    def answer(self, x, cache, kwargs):
        """Attends, to the text or across.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            cache: A `LayerCache` in use.
            kwargs: Dictionary of what else the layer was called with.

        Returns:
            `(output, (key, value))`. A family whose layer returns more than an
            output has a tuple of that in its place.
        """
        if is_encoded(cache.key):
            return self.attend_across(x, cache)
        return self.attend_through(x, cache)

    def returned(self, output):
        """What upstream's layer returns with an output."""
        return (output, None) if self.returns_cache else output

    def _all_at_once(self, x, attention_mask, cache=None, **kwargs):
        """What it needs to attend to all of a text, without upstream's code."""
        if cache is not None:
            raise ValueError(
                f"Expected no `cache` of keras_hub's for {self.name!r}, whose "
                "attention function was replaced. Received: "
                f"{type(cache).__name__}. Call the backbone, with a cache of "
                "`make_cache()`."
            )
        return LayerCache.without_memory(
            attention_mask, ops.shape(x)[1], self.window
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # What becomes of its entry would not leave what is computed again. The
        # block around it is computed again as a whole.
        if block_call.entry_of(self) is not None or block_call.takes_part(self):
            return layer_call
        return super().rematerialized_call(layer_call, *args, **kwargs)
