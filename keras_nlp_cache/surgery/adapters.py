"""Layers that stand in for a part of a decoder block."""

import math

import keras
from keras import ops

from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.graph.lora_file import Adapter
from keras_nlp_cache.graph.saving import deserialize_layer
from keras_nlp_cache.graph.saving import serialize_layer


class AroundProjection(keras.layers.Layer):
    """Base of layers that do something about a projection and call it.

    Args:
        projection: The layer that projects.
        **kwargs: See `keras.layers.Layer`.
    """

    def __init__(self, projection, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.projection = projection

    def compute_output_shape(self, input_shape):
        return self.projection.compute_output_shape(input_shape)

    def get_config(self):
        config = super().get_config()
        config["projection"] = serialize_layer(self.projection)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["projection"] = deserialize_layer(config["projection"])
        return cls(**config)


@keras.saving.register_keras_serializable("keras_nlp_cache")
class LowRankAdapter(AroundProjection, Adapter):
    """Adds a trainable product of two thin matrices to a projection (LoRA).

    It starts as the projection alone, since the second matrix starts at zero.

    Args:
        projection: The layer to adapt, from `(B, T, ...)` to `(B, T, ...)`.
        rank: int. The inner dimension of the product.
        alpha: Optional float. The product is scaled by `alpha / rank`.
            Defaults to `rank`.
        **kwargs: See `keras.layers.Layer`.

    Reference:
        https://arxiv.org/abs/2106.09685
    """

    def __init__(self, projection, rank, alpha=None, **kwargs):
        super().__init__(projection, **kwargs)
        self.rank = rank
        self.alpha = rank if alpha is None else alpha

    def build(self, input_shape):
        output_shape = self.compute_output_shape(input_shape)
        self.down = self.add_weight(
            shape=(math.prod(input_shape[2:]), self.rank),
            initializer="he_uniform",
            name="down",
        )
        self.up = self.add_weight(
            shape=(self.rank, math.prod(output_shape[2:])),
            initializer="zeros",
            name="up",
        )

    def call(self, x):
        y = self.projection(x)
        batch, length = ops.shape(x)[:2]
        update = ops.reshape(x, (batch, length, self.down.shape[0]))
        update = ops.matmul(ops.matmul(update, self.down), self.up)
        update = ops.reshape(update, (batch, length, *y.shape[2:]))
        return y + update * (self.alpha / self.rank)

    def get_config(self):
        return {
            **super().get_config(),
            "rank": self.rank,
            "alpha": self.alpha,
        }


@keras.saving.register_keras_serializable("keras_nlp_cache")
class ScaledHeads(AroundProjection):
    """Scales what each attention head contributes to the output.

    Args:
        projection: The layer that projects `(B, T, heads, head_dim)`, or
            `(B, T, heads * head_dim)`, to `(B, T, hidden_dim)`.
        scale: List of floats, one for each head. 0 ablates a head. They become
            a weight, `scale`, that may be assigned at any time.
        **kwargs: See `keras.layers.Layer`.
    """

    def __init__(self, projection, scale, **kwargs):
        super().__init__(projection, **kwargs)
        self._initial_scale = list(scale)

    def build(self, input_shape):
        self.scale = self.add_weight(
            shape=(len(self._initial_scale),),
            initializer="ones",
            trainable=False,
            name="scale",
        )
        self.scale.assign(self._initial_scale)

    def call(self, x):
        shape = ops.shape(x)
        heads = (*shape[:2], self.scale.shape[0], -1)
        x = ops.reshape(x, heads) * ops.cast(self.scale[:, None], x.dtype)
        return self.projection(ops.reshape(x, shape))

    def get_config(self):
        return {**super().get_config(), "scale": self._initial_scale}


@keras.saving.register_keras_serializable("keras_nlp_cache")
class AttentionSink(keras.layers.Layer):
    """Attention that may attend to nothing: one learned logit for each head.

    Call arguments are those of `keras_nlp_cache.attention.attend()`.

    Args:
        initial: float. The logit to start with.
        **kwargs: See `keras.layers.Layer`.

    Reference:
        https://arxiv.org/abs/2309.17453, and the learned sinks of gpt-oss,
        https://arxiv.org/abs/2508.10925
    """

    def __init__(self, initial=0.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.initial = initial

    def build(self, query_shape):
        self.sink = self.add_weight(
            shape=(query_shape[2],),
            initializer=keras.initializers.Constant(self.initial),
            name="sink",
        )

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
        return attend(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=scale,
            soft_cap=soft_cap,
            dropout=dropout,
            sink=self.with_sink(sink),
            bias=bias,
        )

    def with_sink(self, sink=None):
        """Its own sink, together with the one that a family has, if any.

        Two keys without values are as one of the logit to which their weights
        add up.
        """
        if sink is None:
            return self.sink
        return ops.logaddexp(
            ops.cast(sink, "float32"), ops.cast(self.sink, "float32")
        )

    def compute_output_shape(self, query_shape, **shapes):
        return query_shape

    def compute_mask(self, inputs, previous_mask):
        return None

    def get_config(self):
        return {**super().get_config(), "initial": self.initial}
