"""Each weight of an edited model has a path of its own, and keeps it."""

import io
import pickle

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.edits import assert_unchanged
from tests.edits import BLOCKS
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import original
from tests.edits import snapshot
from tests.families import deep_families
from tests.families import divided
from tests.families import each_kind_that_attends
from tests.families import examples
from tests.families import FAMILIES
from tests.families import in_turn


class Gated(keras.layers.Layer):
    """A projection with a weight more, under the name of the projection."""

    def __init__(self, projection):
        super().__init__(name=projection.name)
        self.projection = projection

    def build(self, shape):
        self.gate = self.add_weight(shape=(), initializer="ones", name="kernel")

    def call(self, x):
        return self.projection(x) * self.gate

    def compute_output_shape(self, shape):
        return self.projection.compute_output_shape(shape)


class Twice(keras.layers.Layer):
    """A layer that gives two weights one name."""

    def build(self, shape):
        self.first = self.add_weight(shape=shape[-1:], name="w")
        self.second = self.add_weight(shape=shape[-1:], name="w")

    def call(self, x):
        return x * self.first + self.second


def adapter(projection):
    """Always of the same name, and built before it is put anywhere."""
    layer = surgery.LowRankAdapter(projection, 2, name="adapter")
    layer.build((None, None, 32))
    return layer


def paths(model):
    """The paths of its weights, all of them distinct."""
    found = [w.path for w in model.weights]
    assert len(set(found)) == len(found), sorted(found)
    return found


@in_turn("edit", EDITS)
def test_every_edit(family, edit):
    lm = original(family)
    edited = EDITS[edit].apply(lm)
    ours = {id(w): w.path for w in lm.weights}
    for weight, path in zip(edited.weights, paths(edited)):
        assert ours.get(id(weight), path) == path


@each_kind_that_attends
def test_where_adapters_stand(family):
    edited = EDITS["add_lora"].apply(original(family).backbone)
    edited = surgery.add_attention_sink(edited, 1)
    found = [w.path for w in edited.weights]
    found = [x for x in found if x.endswith(("/down", "/sink"))]
    assert len(set(found)) == len(found)
    for path, block in zip(found, (0, 0, 1, 1, 1), strict=True):
        attention = getattr(
            edited.blocks[block], edited.blocks[block].attention_name
        )
        assert path.startswith(f"{edited.blocks[block].name}/{attention.name}/")


@deep_families
@settings(
    max_examples=examples(8),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(names=st.lists(st.sampled_from(list(EDITS)), min_size=2, max_size=4))
def test_compositions(family, names):
    backbone = original(family).backbone
    before = snapshot(original(family))
    for name in names:
        if len(backbone.blocks) < BLOCKS:
            backbone = surgery.repeat_blocks(backbone, 0, times=BLOCKS)
        kept = {id(w): w.path for w in backbone.weights}
        backbone = EDITS[name].apply(backbone)
        for weight, path in zip(backbone.weights, paths(backbone)):
            assert kept.get(id(weight), path) == path
    loaded = type(backbone).from_config(backbone.get_config())
    assert paths(loaded) == paths(backbone)
    loaded.set_weights(backbone.get_weights())
    np.testing.assert_allclose(
        full_forward(loaded), full_forward(backbone), atol=1e-5
    )
    assert_unchanged(before, snapshot(original(family)))


COLLIDING = {
    "adapters of one name": lambda m: surgery.replace_projections(
        m, slice(None), ["query", "key"], adapter
    ),
    "adapters of adapters": lambda m: surgery.replace_projections(
        surgery.replace_projections(m, 0, "query", adapter), 0, "query", adapter
    ),
    "twice the same edit": lambda m: surgery.add_lora(
        surgery.add_lora(m, 0, 2), 0, 2
    ),
    "a block with and without": lambda m: surgery.add_lora(
        surgery.add_lora(surgery.repeat_blocks(m, 1, 3), 1, 2), 2, 2
    ),
    # What was there when the block got another name, and what came later.
    "an edited block that stays alone": lambda m: surgery.add_attention_sink(
        surgery.remove(
            surgery.ablate_heads(
                surgery.repeat_blocks(surgery.add_attention_sink(m, 1), 1), 1, 0
            ),
            2,
        ),
        1,
    ),
    "under the name of a projection": lambda m: surgery.replace_projections(
        m, slice(0, 2), "value", Gated
    ),
    "two weights of one name": lambda m: surgery.insert_after(
        m, [0, 1], lambda block: Twice(name=f"{block.name}_twice")
    ),
}


@in_turn("edit", COLLIDING)
def test_colliding_layers(family, edit):
    lm = original(family)
    before = snapshot(lm)
    edited = COLLIDING[edit](lm)
    found = paths(edited)
    assert len(found) > len(lm.weights)
    assert_unchanged(before, snapshot(lm))
    for layer in edited.backbone.layers:
        if keras.config.backend() == "torch" and isinstance(layer, Twice):
            # It finds parameters by their paths.
            assert len(list(layer.parameters())) == 2


SAVED = [x for x in COLLIDING if "projection" not in x and "two" not in x]


@pytest.mark.parametrize("edit", divided([*SAVED, "add_lora"]))
def test_files(edit, tmp_path):
    lm = original(FAMILIES[3])
    lm = EDITS[edit].apply(lm) if edit in EDITS else COLLIDING[edit](lm)
    rng = np.random.default_rng(0)
    for weight in lm.weights:
        if weight.name in ("up", "sink"):
            weight.assign(rng.normal(size=weight.shape))
    expected = full_forward(lm.backbone)
    lm.save(tmp_path / "lm.keras")
    lm.backbone.save_to_preset(tmp_path / "preset")
    backbone = pickle.load(io.BytesIO(pickle.dumps(lm.backbone)))
    for loaded in (
        keras_nlp_cache.load_model(tmp_path / "lm.keras").backbone,
        type(backbone).from_preset(str(tmp_path / "preset")),
        backbone,
    ):
        assert paths(loaded) == paths(lm.backbone)
        np.testing.assert_allclose(full_forward(loaded), expected, atol=1e-5)
        again = surgery.add_lora(loaded, 0, 2)
        assert set(paths(loaded)) < set(paths(again))
