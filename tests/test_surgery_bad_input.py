"""An edit that cannot work is refused when it is made, not when it runs."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_nlp_cache import surgery
from tests.edits import assert_unchanged
from tests.edits import original
from tests.edits import snapshot
from tests.families import deep_families
from tests.families import divided
from tests.families import FAMILIES
from tests.families import in_turn


class CallsInside(keras.layers.Layer):
    """Calls a layer where nobody sees it."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x)


class Attends(keras.layers.Layer):
    """Attention over the text, without a cache."""

    def build(self, shape):
        self.attention = keras.layers.MultiHeadAttention(2, 8)
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x, use_causal_mask=True)


class Averages(keras.layers.Layer):
    """A projection that looks at all positions."""

    def __init__(self, projection):
        super().__init__(name="averages")
        self.projection = projection

    def call(self, x):
        return self.projection(x + ops.mean(x, axis=1, keepdims=True))

    def compute_output_shape(self, shape):
        return self.projection.compute_output_shape(shape)


class Peeks(keras.layers.Layer):
    """An attention function that ignores the mask."""

    def call(self, query, key, value, mask, scale, soft_cap, dropout):
        return query + ops.mean(value, axis=(1, 2))[:, None, None]

    def compute_output_shape(self, query_shape, **shapes):
        return query_shape


class AttendsToItself(keras.layers.Layer):
    """An attention function that looks at nothing but the query."""

    def call(self, query, key, value, mask, scale, soft_cap, dropout):
        return query

    def compute_output_shape(self, query_shape, **shapes):
        return query_shape


def built_for_16():
    layer = keras.layers.Dense(16, name="built")
    layer.build((None, None, 16))
    return layer


def insert(layer):
    return lambda m: surgery.insert_after(m, 1, layer())


def raises(layer, *args, **kwargs):
    raise RuntimeError("on purpose")


EDITS = {
    # The hidden size and the rank.
    "a narrower layer": (
        insert(lambda: keras.layers.Dense(16, name="narrow")),
        ["'narrow'", "(None, None, 32)", "(None, None, 16)"],
    ),
    "a layer built for another size": (
        insert(built_for_16),
        ["'built'", "(None, None, 32)", "16"],
    ),
    "an unbuilt layer of another rank": (
        insert(lambda: keras.layers.Conv2D(32, 3, name="flat")),
        ["'flat'", "(None, None, 32)", "4"],
    ),
    "a layer that flattens": (
        insert(lambda: keras.layers.Flatten(name="flatten")),
        ["'flatten'", "(None, None, 32)", "(None, None)"],
    ),
    "a narrower layer before": (
        lambda m: surgery.insert_before(
            m, 0, keras.layers.Dense(16, name="narrow")
        ),
        ["'narrow'", "(None, None, 32)", "(None, None, 16)"],
    ),
    "a narrower replacement": (
        lambda m: surgery.replace(m, 0, keras.layers.Dense(8, name="narrow")),
        ["'narrow'", "(None, None, 32)", "(None, None, 8)"],
    ),
    "rewired to another size": (
        lambda m: surgery.rewire(
            m, lambda layer, *a, **k: layer(*a, **k)[..., :8]
        ),
        ["token_embedding", "(None, None, 32)", "(None, None, 8)"],
    ),
    "rewired to fewer positions": (
        lambda m: surgery.rewire(
            m, lambda layer, *a, **k: layer(*a, **k)[:, -1:]
        ),
        ["get_item"],
    ),
    # Caches.
    "a convolution over the text": (
        insert(lambda: keras.layers.Conv1D(32, 3, padding="causal", name="c")),
        ["'c'", "treat each position alone", "Conv1D"],
    ),
    "a recurrent layer": (
        insert(lambda: keras.layers.GRU(32, return_sequences=True, name="g")),
        ["'g'", "treat each position alone", "GRU"],
    ),
    "attention without a cache": (
        insert(lambda: Attends(name="attends")),
        ["'attends'", "treat each position alone", "decoder block"],
    ),
    "a block inside another layer": (
        lambda m: surgery.replace(
            m, 1, lambda block: CallsInside(block, name="hides")
        ),
        ["'hides'", "decoder block", "where it gets its cache"],
    ),
    "an operation over the text": (
        lambda m: surgery.rewire(
            m,
            lambda layer, *a, **k: (
                layer(*a, **k) + ops.cumsum(layer(*a, **k), axis=1)
            ),
        ),
        ["cumsum", "treat each position alone"],
    ),
    "no block left": (
        lambda m: surgery.remove(m, slice(None)),
        ["at least one decoder block"],
    ),
    # What is no layer.
    "a string": (insert(lambda: "dense"), ["Keras layer", "'dense'"]),
    "a class": (insert(lambda: keras.layers.Dense), ["Keras layer", "Dense"]),
    "a function that returns nothing": (
        lambda m: surgery.insert_after(m, 1, lambda block: None),
        ["Keras layer", "None"],
    ),
    "two layers of one name": (
        lambda m: surgery.insert_after(
            m, slice(None), lambda block: keras.layers.Dense(32, name="same")
        ),
        ["same", "unique"],
    ),
    # Rewiring.
    "a call that raises": (
        lambda m: surgery.rewire(m, raises),
        ["token_embedding", "(None, None, 32)", "on purpose"],
    ),
    "a call that returns nothing": (
        lambda m: surgery.rewire(m, lambda *args, **kwargs: None),
        ["token_embedding", "(None, None, 32)", "NoneType"],
    ),
    "a call that returns an array": (
        lambda m: surgery.rewire(m, lambda *args, **kw: np.zeros((1, 1, 32))),
        ["token_embedding", "symbolic", "ndarray"],
    ),
    "removing the embedding": (
        lambda m: surgery.remove(m, "token_embedding"),
        ["token_embedding", "(None, None, 32)", "(None, None)"],
    ),
    # Blocks only.
    "keeping something else": (
        lambda m: surgery.keep_blocks(m, "token_embedding"),
        ["decoder blocks only", "token_embedding"],
    ),
    "repeating something else": (
        lambda m: surgery.repeat_blocks(m, "token_embedding"),
        ["decoder blocks only", "token_embedding"],
    ),
    "repeating no times": (
        lambda m: surgery.repeat_blocks(m, 0, times=0),
        ["`times`", "0"],
    ),
    "repeating half a time": (
        lambda m: surgery.repeat_blocks(m, 0, times=1.5),
        ["`times`", "1.5"],
    ),
    "selecting nothing": (
        lambda m: surgery.insert_after(m, 7, keras.layers.Dense(32)),
        ["`where`", "7", "3 decoder blocks"],
    ),
    # Inside attention.
    "an unknown projection": (
        lambda m: surgery.add_lora(m, 0, 2, ["query", "nose"]),
        ["`projections`", "nose", "output", "gate"],
    ),
    "no projection": (
        lambda m: surgery.add_lora(m, 0, 2, []),
        ["`projections`", "[]"],
    ),
    "rank zero": (lambda m: surgery.add_lora(m, 0, 0), ["`rank`", "0"]),
    "adapters on something else": (
        lambda m: surgery.add_lora(m, "token_embedding", 2),
        ["decoder blocks only", "token_embedding"],
    ),
    "one layer for all projections": (
        lambda m: surgery.replace_projections(
            m, 0, "key", keras.layers.Dense(8)
        ),
        ["`layer`", "function", "Dense"],
    ),
    "a projection of another shape": (
        lambda m: surgery.replace_projections(
            m, 0, "query", lambda old: keras.layers.Dense(8, name="narrow")
        ),
        ["'narrow'", "query", "(None, None, 32)", "(None, None, 8)"],
    ),
    "a projection that is none": (
        lambda m: surgery.replace_projections(m, 0, "query", lambda old: 3),
        ["Keras layer", "query", "3"],
    ),
    "a projection that mixes positions": (
        lambda m: surgery.replace_projections(m, 0, "value", Averages),
        ["'averages'", "treat each position alone"],
    ),
    "a head that is not there": (
        lambda m: surgery.ablate_heads(m, 0, [0, 4]),
        ["`heads`", "4 heads", "[0, 4]"],
    ),
    "an attention function that ignores the mask": (
        lambda m: surgery.replace_attention(
            m, 0, lambda attention: Peeks(name="peeks")
        ),
        ["'peeks'", "`mask` hides"],
    ),
    "an attention function that is none": (
        lambda m: surgery.replace_attention(m, 0, lambda attention: ops.add),
        ["Keras layer", "attend()"],
    ),
    # At sites inside a block.
    "a part that no block has": (
        lambda m: surgery.tap(m, "block.0.nose"),
        ["`where`", "'block.0.nose'", "'feedforward.down'", "'residual'"],
    ),
    "a part of a block that is not there": (
        lambda m: surgery.tap(m, "block.7.attention"),
        ["`where`", "'block.7.attention'", "3 decoder blocks"],
    ),
    "parts where blocks are needed": (
        lambda m: surgery.ablate_heads(m, "block.*.attention", 0),
        ["decoder blocks only", "'block.*.attention'"],
    ),
    "a narrower layer inside": (
        lambda m: surgery.insert_after(
            m, "block.1.residual", keras.layers.Dense(16, name="narrow")
        ),
        ["'narrow'", "1.residual", "(None, None, 32)", "(None, None, 16)"],
    ),
    "a layer that mixes positions inside": (
        lambda m: surgery.insert_after(
            m, "block.1.feedforward", Attends(name="attends")
        ),
        ["'attends'", "treat each position alone"],
    ),
    "no layer inside": (
        lambda m: surgery.replace(m, "block.1.residual", lambda old: 3),
        ["`layer`", "Received: 3"],
    ),
    "to remove what changes the shape": (
        lambda m: surgery.remove(m, "block.1.feedforward.up"),
        ["'feedforward'", "feedforward.up", "(None, None, 32)"],
    ),
    "to remove attention weights": (
        lambda m: surgery.remove(m, "block.1.attention.weights"),
        ["tapped only", "replace_attention()"],
    ),
    "to edit what was replaced": (
        lambda m: surgery.add_lora(
            surgery.remove(m, "block.1.attention"), 1, 2, "query"
        ),
        ["attention was replaced by 'nothing'", "attention.query"],
    ),
    "to replace what is tapped inside": (
        lambda m: surgery.remove(
            surgery.tap(m, "block.1.attention.query"), "block.1.attention"
        ),
        ["to have no taps", "attention.query", "Tap afterwards"],
    ),
    "to attend otherwise where weights are tapped": (
        lambda m: surgery.add_attention_sink(
            surgery.tap(m, "block.1.attention.weights"), 1
        ),
        ["tapped", "Tap afterwards"],
    ),
    "the weights of a function nobody knows": (
        lambda m: surgery.tap(
            surgery.replace_attention(
                m, 1, lambda attention: AttendsToItself(name="itself")
            ),
            "block.1.attention.weights",
        ),
        ["function was replaced by 'itself'"],
    ),
}


def test_a_family_without_a_gate():
    with pytest.raises(ValueError) as error:
        surgery.add_lora(original(FAMILIES[0]), 0, 2, ["gate"])
    for word in ("'feedforward.gate'", "'up', 'down'"):
        assert word in str(error.value)


@in_turn("kind", divided(EDITS))
def test_refused(family, kind):
    edit, words = EDITS[kind]
    lm = original(family)
    before = snapshot(lm)
    with pytest.raises(ValueError) as error:
        edit(lm)
    for word in words:
        assert word in str(error.value), word
    assert_unchanged(before, snapshot(lm))


@pytest.mark.parametrize(
    "model",
    [None, "llama", keras.layers.Dense(3), FAMILIES[0].upstream("Backbone")],
    ids=["none", "a string", "a layer", "a class"],
)
def test_not_a_model(model):
    for edit in (
        lambda: surgery.select(model, 0),
        lambda: surgery.remove(model, 0),
        lambda: surgery.rewire(model, lambda layer, *args: layer(*args)),
    ):
        with pytest.raises(ValueError, match="Expected `model` to be a backb"):
            edit()


@deep_families
def test_a_model_of_upstream(family):
    _, upstream = family.lm_pair
    for model in (upstream, upstream.backbone):
        with pytest.raises(ValueError, match="of `keras_nlp_cache.models`"):
            surgery.remove(model, 0)


def test_an_edit_after_a_refused_one():
    """What a refused edit left on the layers does not disturb the next."""
    lm = original(FAMILIES[0])
    block = lm.backbone.blocks[0]
    new = type(block).from_config({**block.get_config(), "name": "again"})
    narrow = keras.layers.Dense(16)
    with pytest.raises(ValueError):
        surgery.rewire(
            lm,
            lambda layer, x, *a, **k: (
                narrow(new(layer(x, *a, **k)))
                if layer is block
                else layer(x, *a, **k)
            ),
        )
    edited = surgery.insert_after(lm, 0, new)
    assert len(edited.backbone.make_cache(1, 4)) == 4
