"""Layers by which edits of a part of a decoder block come about.

Each holds the layer whose place it takes, and does something before or after
it. They add no weights of their own. What the block's code passes by keyword
goes to that layer. Of what it returns, they treat the first: a mixture of
experts returns how it chose them, too.
"""

import keras
from keras import ops

from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.attention.functions import attention_weights
from keras_nlp_cache.graph.saving import deserialize_layer
from keras_nlp_cache.graph.saving import serialize_layer
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.block_call import BlockTap
from keras_nlp_cache.layers.block_call import InBlock


class _Holder(keras.layers.Layer):
    """Base of layers that hold others, shared with the graph they came from.

    Args:
        *layers: For each of `held`, in that order, a layer or `None`.
        **kwargs: See `keras.layers.Layer`.

    Attributes:
        held: Names of the attributes that hold layers.
    """

    held = ()

    def __init__(self, *layers, **kwargs):
        # What comes in goes on as it came, in whatever dtype.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        for name, layer in zip(self.held, layers, strict=True):
            setattr(self, name, layer)
        self.built = True

    def compute_mask(self, inputs, previous_mask):
        return previous_mask

    def get_config(self):
        config = super().get_config()
        for name in self.held:
            layer = getattr(self, name)
            config[name] = None if layer is None else serialize_layer(layer)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        layers = [deserialize_layer(config.pop(name)) for name in cls.held]
        return cls(*layers, **config)


def _on_first(function, outputs):
    """What a layer returned, with a function applied to the first of it."""
    if isinstance(outputs, tuple):
        return function(outputs[0]), *outputs[1:]
    return function(outputs)


@keras.saving.register_keras_serializable("keras_nlp_cache")
class Chain(_Holder):
    """Calls one layer on what another returns."""

    held = ("first", "second")

    def call(self, x, training=None, **kwargs):
        return _on_first(self.second, self.first(x, **kwargs))

    def compute_output_shape(self, input_shape):
        return self.second.compute_output_shape(
            self.first.compute_output_shape(input_shape)
        )


@keras.saving.register_keras_serializable("keras_nlp_cache")
class OnResidual(_Holder, InBlock):
    """Edits the sum of a block's input and the result of its attention.

    Stands in the place of the last layer of the attention, and returns what
    makes the sum that which was asked for.

    Args:
        part: The last layer of the attention.
        layer: The layer that is called, `None` to leave the input of the block
            out of the sum.
        on_sum: bool. Whether it is called on the sum, or on the result of the
            attention and stands for the sum.
        **kwargs: See `keras.layers.Layer`.
    """

    held = ("part", "layer")

    def __init__(self, part, layer, on_sum, **kwargs):
        super().__init__(part, layer, **kwargs)
        self.on_sum = on_sum

    def call(self, x, training=None, **kwargs):
        x = self.part(x, **kwargs)
        residual = ops.cast(block_call.current().hidden_states, x.dtype)
        if self.on_sum:
            x = residual + x
        return (x if self.layer is None else self.layer(x)) - residual

    def compute_output_shape(self, input_shape):
        return self.part.compute_output_shape(input_shape)

    def get_config(self):
        return {**super().get_config(), "on_sum": self.on_sum}


@keras.saving.register_keras_serializable("keras_nlp_cache")
class BranchStart(_Holder, InBlock):
    """Keeps what a branch of a block starts from, for `InsteadOfBranch`.

    Args:
        part: The layer that normalizes what the branch starts from.
        branch: `"feedforward"`.
        **kwargs: See `keras.layers.Layer`.
    """

    held = ("part",)

    def __init__(self, part, branch, **kwargs):
        super().__init__(part, **kwargs)
        self.branch = branch

    def call(self, x, training=None, **kwargs):
        x = self.part(x, **kwargs)
        block_call.current().branch_inputs[self.branch] = x
        return x

    def compute_output_shape(self, input_shape):
        return self.part.compute_output_shape(input_shape)

    def get_config(self):
        return {**super().get_config(), "branch": self.branch}


@keras.saving.register_keras_serializable("keras_nlp_cache")
class InsteadOfBranch(_Holder, InBlock):
    """Ignores what the last layer of a branch gets, and calls a layer instead.

    Args:
        layer: The layer to call on what the branch starts from, `None` for a
            branch that adds nothing.
        branch: `"feedforward"`.
        further: int. How many things the layer returned that was there before,
            beyond the first. Each is now `None`.
        **kwargs: See `keras.layers.Layer`.
    """

    held = ("layer",)

    def __init__(self, layer, branch, further=0, **kwargs):
        super().__init__(layer, **kwargs)
        self.branch = branch
        self.further = further

    def call(self, x, training=None, **kwargs):
        if self.layer is None:
            x = ops.zeros_like(block_call.current().hidden_states)
        else:
            x = self.layer(block_call.current().branch_inputs[self.branch])
        return (x, *[None] * self.further) if self.further else x

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "branch": self.branch,
            "further": self.further,
        }


@keras.saving.register_keras_serializable("keras_nlp_cache")
class Nothing(keras.layers.Layer):
    """Returns zeros, in the shape of what comes in."""

    def call(self, x):
        return ops.zeros_like(x)


@keras.saving.register_keras_serializable("keras_nlp_cache")
class Tap(_Holder, BlockTap):
    """Has the block return what one of its parts does.

    Args:
        layer: The layer that is tapped.
        part: str, the name of the part. `"residual"` stands for the sum of
            what `layer` returns and what the block was called with.
        shape: What it returns, but for the first two dimensions.
        **kwargs: See `keras.layers.Layer`.
    """

    held = ("layer",)

    def __init__(self, layer, part, shape, **kwargs):
        super().__init__(layer, **kwargs)
        self.part = part
        self.tapped_shape = tuple(shape)

    def call(self, x, training=None, **kwargs):
        return _on_first(self._tapped, self.layer(x, **kwargs))

    def _tapped(self, x):
        call = block_call.current()
        if self.part == "residual" and call is not None:
            self.put(ops.cast(call.hidden_states, x.dtype) + x)
        else:
            self.put(x)
        return x

    def tap_spec(self, hidden_states, slots):
        shape = (*hidden_states.shape[:2], *self.tapped_shape)
        return keras.KerasTensor(shape, hidden_states.dtype)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "part": self.part,
            "shape": self.tapped_shape,
        }


@keras.saving.register_keras_serializable("keras_nlp_cache")
class WeightsTap(_Holder, BlockTap):
    """Has the block return its attention weights.

    Called in place of `keras_nlp_cache.attention.attend()`.

    Args:
        function: The layer that was called before, with a weight `sink`, or
            `None` for `attend()` itself.
        heads: int. The number of query heads.
        **kwargs: See `keras.layers.Layer`.
    """

    held = ("function",)
    part = "attention.weights"

    def __init__(self, function, heads, **kwargs):
        super().__init__(function, **kwargs)
        self.heads = heads

    def call(
        self,
        query,
        key,
        value,
        mask,
        scale,
        soft_cap,
        dropout,
        sink=None,
        bias=None,
    ):
        further = {"sink": sink, "bias": bias}
        own = sink if self.function is None else self.function.with_sink(sink)
        weights = attention_weights(
            query, key, mask, scale, soft_cap, own, bias
        )
        batch, _, _, length, slots = ops.shape(weights)
        self.put(ops.reshape(weights, (batch, self.heads, length, slots)))
        return (self.function or attend)(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=scale,
            soft_cap=soft_cap,
            dropout=dropout,
            **further,
        )

    def tap_spec(self, hidden_states, slots):
        batch, length = hidden_states.shape[:2]
        return keras.KerasTensor((batch, self.heads, length, slots))

    def compute_output_shape(self, query_shape, **shapes):
        return query_shape

    def compute_mask(self, inputs, previous_mask):
        return None

    def get_config(self):
        return {**super().get_config(), "heads": self.heads}
