"""Layers that keep a state in place of keys and values, as linear attention.

A family subclasses `Recurrent` together with upstream's layer, and says how
upstream's code goes on from a state. What padding does to a state, and where it
begins, is the business of this module.
"""

from keras import ops

from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.policies.state import State
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.remembering import Remembers
from keras_nlp_cache.layers.specializing import Specialized


class Recurrent(Specialized, Remembers):
    """Mixin that gives an upstream layer a state in the cache.

    Placed before the upstream class in the bases of a layer of the same name.
    Without a cache upstream's code runs as it is. With one, the state moves on
    over the tokens that are no padding, wherever in the call these stand: they
    are moved to its beginning, and what became of them back.

    Attributes that a family sets:
        state_shapes: `StateShapes`.
        advance: Method `(x, state, real, kwargs) -> (output, state)`, from a
            tensor `(B, T, hidden_dim)`, a pair of tensors, bool `(B, T)` or
            `None`, and the other arguments of the call. Where `real` is false,
            the state is not to change. Before tokens are, there are none that
            are not. An output may be a tuple of tensors `(B, T, ...)`.
        of_each_token: Names of arguments of the call that are tensors `(B, T,
            ...)`, too.
        projections: Dictionary from what surgery calls them to the attributes
            that hold the layers which project, `"output"` among them, if the
            layer is the attention of its block to surgery.
        returned: Method from the output to what upstream's layer returns.

    Attributes that surgery sets:
        stand_in: As for `CachedAttention`.
    """

    of_each_token = ()
    projections = {}
    merges_heads = True
    drops_output = False

    def on_specialized(self):
        """Raises a `ValueError` if something is not where it was looked for."""
        for layer in self._flatten_layers(include_self=False):
            # What has no weights upstream need not build, but Keras quantizes
            # no model before.
            layer.built = layer.built or not layer.weights
        for name in self.projections.values():
            if getattr(self, name, None) is None:
                raise ValueError(
                    f"Expected {type(self).__name__!r}, a layer of keras_hub "
                    f"with a state, to have {name}. Received none, in "
                    f"{self.name!r}. The class in keras_hub is another one "
                    "than this package was written for: its module in "
                    "`keras_nlp_cache/models/` has to say what differs."
                )

    def projection(self, name):
        """The layer that projects to something, such as the output."""
        return getattr(self, self.projections[name])

    def returned(self, output):
        return output

    def call(self, *args, **kwargs):
        """Goes on from the state of the call under way, or as upstream.

        Returns:
            As upstream does.
        """
        x, rest = first_argument(args, kwargs), kwargs
        entry = block_call.entry_of(self)
        if hasattr(self, "stand_in"):
            return self.projection("output")(self.stand_in(x))
        if entry is None:
            return super().call(*args, **kwargs)
        before = self._state(x, entry)
        order = place = None
        real = entry.mask
        if real is not None and x.shape[1] != 1:
            order, place = _order(real)
            x = _in_order(x, order)
            real = ops.cast(_in_order(ops.cast(real, "int32"), order), "bool")
            rest = {
                name: _in_order(y, order) if name in self.of_each_token else y
                for name, y in kwargs.items()
            }
        output, after = self.advance(x, before, real, rest)
        if place is not None:
            output = _each(lambda y: _in_order(y, place), output)
        if entry.key is not None:
            if real is not None:
                # Of which there may be none.
                moves = ops.any(real, axis=1)
                after = [_chosen(moves, x, y) for x, y in zip(after, before)]
            block_call.current().updated[id(self)] = tuple(
                State(access().replace(kept.stored, new))
                for kept, new in zip((entry.key, entry.value), after)
            )
        return self.returned(output)

    def _state(self, x, entry):
        """The pair of tensors to go on from."""
        if entry.key is None:
            batch = ops.shape(x)[0]
            return tuple(
                ops.zeros((batch, *shape), "float32")
                for shape in self.state_shapes
            )
        # A text begins with no state, whatever is there of another one.
        goes_on = ops.reshape(entry.index, (-1,)) != 0
        return tuple(
            _chosen(goes_on, kept.stored, ops.zeros_like(kept.stored))
            for kept in (entry.key, entry.value)
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # As for `CachedAttention`.
        if block_call.entry_of(self) is not None or block_call.takes_part(self):
            return layer_call
        return super().rematerialized_call(layer_call, *args, **kwargs)


def last_of(before, x, real):
    """The last token of each row that is no padding.

    Args:
        before: Tensor `(B, 1, ...)`, what it was before.
        x: Tensor `(B, T, ...)`.
        real: bool `(B, T)`, true for the first tokens of each row, or `None`.
    """
    if real is None:
        return x[:, -1:]
    count = ops.sum(ops.cast(real, "int32"), axis=1, keepdims=True)
    return _in_order(ops.concatenate([before, x], axis=1), count)


def _chosen(rows, x, y):
    """In some rows, bool `(B or 1,)`, one tensor, and in others another."""
    rows = ops.reshape(rows, (-1, *[1] * (len(x.shape) - 1)))
    return ops.where(rows, x, ops.cast(y, x.dtype))


def _order(real):
    """What moves the tokens that are no padding to the beginning.

    Args:
        real: bool `(B, T)`.

    Returns:
        `(order, place)`, int32 `(B, T)`: which tokens to take, and where each
        is then.
    """
    ones = ops.cast(real, "int32")
    count = ops.sum(ones, axis=1, keepdims=True)
    place = ops.where(
        real,
        ops.cumsum(ones, axis=1) - 1,
        count + ops.cumsum(1 - ones, axis=1) - 1,
    )
    place = ops.cast(place, "int32")
    return ops.argsort(place, axis=1), place


def _in_order(x, order):
    """Tokens of a tensor `(B, T, ...)`, in another order, or `None` of none."""
    if x is None:
        return None
    for _ in x.shape[2:]:
        order = order[..., None]
    return ops.take_along_axis(x, order, axis=1)


def _each(function, outputs):
    if isinstance(outputs, tuple):
        return tuple(function(x) for x in outputs)
    return function(outputs)
