"""A layer that mixes positions is refused, at whatever distance it does."""

import functools

import keras
import pytest
from keras import ops

from keras_nlp_cache import surgery
from tests.edits import original
from tests.families import divided
from tests.families import FAMILIES
from tests.families import in_turn

LONG = 1024


@functools.cache
def _long_original():
    """A model with room for what acts far from the start of a text."""
    family = FAMILIES[0]
    backbone = family.backbone(max_sequence_length=LONG)
    return family.task(backbone, None)


class Function(keras.layers.Layer):
    """A layer that is a function of its input."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_shape(self, shape):
        return shape


def _shift(x, count):
    """What was `count` positions before, zeros at the start."""
    length = ops.shape(x)[1]
    return ops.pad(x, [[0, 0], [count, 0], [0, 0]])[:, :length]


def acts_from(start):
    def function(x):
        late = ops.arange(ops.shape(x)[1]) >= start
        late = ops.cast(late, x.dtype)[None, :, None]
        return x + late * _shift(x, 1)

    return lambda: Function(function)


def shift(count):
    return lambda: Function(lambda x: x + _shift(x, count))


def conv(**kwargs):
    return lambda: keras.layers.Conv1D(32, **kwargs)


def pool(x):
    x = ops.max_pool(x, 4, strides=4, padding="same")
    return ops.repeat(x, 4, axis=1)


def over_positions(x):
    centered = x - ops.mean(x, axis=1, keepdims=True)
    return centered / (ops.std(x, axis=1, keepdims=True) + 1e-3)


def function(f):
    return lambda: Function(f)


MIXING = {
    "acts from position 6 on": acts_from(6),
    "a shift by 4": shift(4),
    "a strided pool": lambda: keras.layers.MaxPooling1D(
        4, strides=4, padding="same"
    ),
    "a strided pool, repeated": lambda: Function(
        lambda x: pool(x)[:, : ops.shape(x)[1]]
    ),
    "a convolution with dilation 4": conv(
        kernel_size=2, dilation_rate=4, padding="causal"
    ),
    "a convolution with dilation 16": conv(
        kernel_size=3, dilation_rate=16, padding="causal"
    ),
    "a cumulative sum": function(lambda x: ops.cumsum(x, axis=1)),
    "normalization over positions": function(over_positions),
    "what looks at the length": function(
        lambda x: x * ops.cast(ops.shape(x)[1], x.dtype)
    ),
    "what mixes rows of a batch": function(
        lambda x: x - ops.mean(x, axis=0, keepdims=True)
    ),
    "a reversed text": function(lambda x: ops.flip(x, axis=1)),
    "a little of the position before": function(
        lambda x: x + 1e-5 * _shift(x, 1)
    ),
    "Dense with an activation over positions": lambda: keras.layers.Dense(
        32, activation=lambda x: ops.softmax(x, axis=1)
    ),
    "Dense with a layer for its activation": lambda: keras.layers.Dense(
        32, activation=keras.layers.Softmax(axis=1)
    ),
}

MIXING_FAR = {
    "acts from position 500 on": acts_from(500),
    "a shift by 700": shift(700),
    "a convolution with dilation 64": conv(
        kernel_size=2, dilation_rate=64, padding="causal"
    ),
}

POSITIONWISE = {
    "Dense": lambda: keras.layers.Dense(32, activation="gelu"),
    "LayerNormalization": keras.layers.LayerNormalization,
    "BatchNormalization": keras.layers.BatchNormalization,
    "Dropout": lambda: keras.layers.Dropout(0.5),
    "Conv1D of one position": conv(kernel_size=1),
    "EinsumDense": lambda: keras.layers.EinsumDense(
        "btd,de->bte", (None, 32), bias_axes="e"
    ),
    "EinsumDense with dots": lambda: keras.layers.EinsumDense(
        "...d,de->...e", (32,)
    ),
    "a nonlinearity": function(lambda x: x + ops.sin(3 * x)),
    "one without a gradient": function(lambda x: ops.floor(4 * x)),
    "a shift, there and back": function(
        lambda x: ops.flip(ops.flip(x, axis=1), axis=1)
    ),
}


def _insert(layer):
    return lambda lm: surgery.insert_after(lm, 1, layer())


def _inside(layer):
    return lambda lm: surgery.insert_after(lm, "block.1.feedforward", layer())


@pytest.mark.parametrize("edit", [_insert, _inside], ids=["after", "inside"])
@in_turn("kind", divided(MIXING))
def test_refused(family, kind, edit):
    lm = original(family)
    with pytest.raises(ValueError, match="treat each position alone"):
        edit(MIXING[kind])(lm)


@pytest.mark.parametrize("edit", [_insert, _inside], ids=["after", "inside"])
@pytest.mark.parametrize("kind", MIXING_FAR)
def test_refused_far_from_the_start(kind, edit):
    with pytest.raises(ValueError, match="treat each position alone"):
        edit(MIXING_FAR[kind])(_long_original())


def test_refused_where_positions_are_not_counted():
    """Rotated positions have no end, so that no window escapes."""
    llama = next(x for x in FAMILIES if x.name == "llama")
    with pytest.raises(ValueError, match="treat each position alone"):
        _insert(shift(700))(original(llama))


@pytest.mark.parametrize("edit", [_insert, _inside], ids=["after", "inside"])
@in_turn("kind", POSITIONWISE)
def test_accepted(family, kind, edit):
    lm = original(family)
    edited = edit(POSITIONWISE[kind])(lm)
    assert len(edited.backbone.blocks) == len(lm.backbone.blocks)


class Attends(keras.layers.Layer):
    """Attention, of which each query sees what it should not."""

    def __init__(self, change, **kwargs):
        super().__init__(**kwargs)
        self.change = change

    def call(self, query, key, value, mask, scale, soft_cap, dropout):
        return query + self.change(query, value, mask)

    def compute_output_shape(self, query_shape, **shapes):
        return query_shape


ATTENTION = {
    "a query 4 before": lambda query, value, mask: ops.pad(
        query, [[0, 0], [4, 0], [0, 0], [0, 0]]
    )[:, : ops.shape(query)[1]],
    "a query 700 before": lambda query, value, mask: ops.pad(
        query, [[0, 0], [700, 0], [0, 0], [0, 0]]
    )[:, : ops.shape(query)[1]],
    "slots from 500 on": lambda query, value, mask: ops.sum(
        value[:, :, 500:], axis=(1, 2)
    )[:, None, None],
}


@in_turn("kind", ATTENTION)
def test_attention_refused(family, kind):
    with pytest.raises(ValueError, match="treat each query alone"):
        surgery.replace_attention(
            original(family), 0, lambda attention: Attends(ATTENTION[kind])
        )


def test_attention_accepted():
    edited = surgery.replace_attention(
        original(FAMILIES[0]),
        0,
        lambda attention: Attends(lambda query, value, mask: ops.sin(query)),
    )
    assert len(edited.backbone.blocks) == 3
