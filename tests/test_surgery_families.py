"""Each family through all of surgery: one model with an edit of each kind."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.edits import assert_greedy_after
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import dense
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import original
from tests.edits import query_of
from tests.edits import TOKENS
from tests.families import every_family
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import to_numpy

PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}


def assert_close(x, y):
    np.testing.assert_allclose(x, y, atol=5e-5, rtol=5e-4)


@functools.cache
def donor(family):
    """A backbone that others take a block and a norm of."""
    return family.backbone(num_layers=1)


def after(family):
    """The family that comes after another, in a circle."""
    return FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]


def norm_of(backbone):
    return surgery.select(backbone, "block.0.feedforward.norm")[0].layer


def edited_everywhere(family):
    """A task with an edit of each kind, and a block of another family."""
    lm = original(family)
    has = lm.backbone.blocks[0].part_paths
    projections = [query_of(lm), "output"]
    if "feedforward.down" in has:
        projections.append("down")
    lm = surgery.add_lora(lm, slice(0, 2), 2, projections)
    rng = np.random.default_rng(1)
    for weight in lm.weights:
        if weight.name == "up":
            weight.assign(0.3 * rng.normal(size=weight.shape))
    lm = surgery.ablate_heads(lm, 0, [0, -1])
    lm = surgery.add_attention_sink(lm, [0, 2], initial=1.0)
    lm = surgery.insert_after(
        lm, ["block.1.residual", "block.1.feedforward"], dense
    )
    lm = surgery.replace(lm, "block.2.feedforward", dense)
    lm = surgery.remove(lm, "block.2.attention")
    lm = surgery.insert_after(lm, -1, donor(after(family)).blocks[0])
    lm = surgery.insert_after(lm, 0, norm_of(donor(after(family))))
    lm = surgery.tap(
        lm,
        [
            "block.1.residual",
            "block.*.feedforward",
            "block.0.attention.weights",
            1,
        ],
    )
    vector = surgery.ControlVector({1: rng.normal(size=32)}, family.prefix)
    return vector.apply(lm, 0.5)


@every_family
def test_edited(family, tmp_path):
    lm = edited_everywhere(family)
    full = full_forward(lm.backbone)
    assert np.abs(full - full_forward(original(family).backbone)).max() > 1e-2
    assert len(lm.backbone.make_cache(2, LENGTH)) == BLOCKS + 1
    assert_close(cached_forward(lm.backbone), full)
    lm.compile(sampler="greedy")
    generated = lm.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], lm)
    lm.save(tmp_path / "lm.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras").backbone
    assert type(loaded) is type(lm.backbone)
    assert [w.path for w in loaded.weights] == [
        w.path for w in lm.backbone.weights
    ]
    assert loaded.taps == lm.backbone.taps
    assert_close(full_forward(loaded), full)


@every_family
def test_projections(family):
    """They are called what they are: what is normalized goes up, then down."""
    backbone = original(family).backbone
    has = backbone.blocks[1].part_paths
    if "feedforward.down" not in has:
        with pytest.raises(ValueError, match=r"some of .*'output'\].*has not"):
            surgery.add_lora(backbone, 1, 2, ["down"])
        return
    names = ["norm", "up", "down"] + ["gate"] * ("feedforward.gate" in has)

    def taps_of(backbone):
        where = [f"block.1.feedforward.{name}" for name in names]
        _, taps = surgery.tap(backbone, where)({"token_ids": TOKENS})
        return {
            name.rpartition(".")[2]: to_numpy(x) for name, x in taps.items()
        }

    def layer(part):
        return surgery.select(backbone, f"block.1.feedforward.{part}")[0].layer

    def scaled(part):
        edited = surgery.insert_after(
            backbone, f"block.1.feedforward.{part}", keras.layers.Rescaling(2.0)
        )
        return taps_of(edited)["down"] - zero

    before = taps_of(backbone)
    for part in set(names) & {"up", "gate"}:
        expected = layer(part)(ops.convert_to_tensor(before["norm"]))
        assert_close(before[part], to_numpy(expected))
    inner = ops.zeros((1, 1, layer("down").kernel.shape[0]))
    zero = to_numpy(layer("down")(inner))
    after = before["down"] - zero
    if "gate" in names:
        # It is the gate that has an activation.
        assert_close(scaled("up"), 2 * after)
        assert np.abs(scaled("gate") - 2 * after).max() > 1e-2
