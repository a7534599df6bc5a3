"""What an edit would apply to can be looked at before."""

import re

import keras
import pytest

from keras_nlp_cache import surgery
from tests.edits import original
from tests.families import deep_families
from tests.families import in_turn


def names(model, where):
    return [site.name for site in surgery.select(model, where)]


@deep_families
def test_selections(family):
    lm = original(family)
    blocks = lm.backbone.blocks
    all_blocks = [block.name for block in blocks]
    block_cls = type(blocks[0])
    stem = all_blocks[0].rstrip("0")
    for where, expected in (
        (blocks[1], all_blocks[1:2]),
        (all_blocks[2], all_blocks[2:]),
        (f"{stem}*", all_blocks),
        (f"{stem}[02]", all_blocks[::2]),
        (re.compile(f"{stem}[12]$"), all_blocks[1:]),
        (block_cls, all_blocks),
        (block_cls.__mro__[2], all_blocks),  # Upstream's class.
        (0, all_blocks[:1]),
        (-1, all_blocks[-1:]),
        (slice(1, None), all_blocks[1:]),
        (slice(None, None, -2), all_blocks[::2]),
        (range(2), all_blocks[:2]),
        (lambda layer: layer in blocks[:2], all_blocks[:2]),
        ([2, all_blocks[0]], all_blocks[::2]),
        (surgery.select(lm, 1), all_blocks[1:2]),
        (surgery.select(lm, 1)[0], all_blocks[1:2]),
        ("token_embedding", ["token_embedding"]),
    ):
        assert names(lm, where) == expected, where
        assert names(lm.backbone, where) == expected, where


@deep_families
def test_sites(family):
    lm = original(family)
    sites = surgery.select(lm, keras.Operation)
    assert {site.layer for site in sites} == {
        operation
        for operation in lm.backbone.operations
        if not isinstance(operation, keras.layers.InputLayer)
        and not operation.name.startswith(("positions", "mask"))
    }
    assert [site.block for site in surgery.select(lm, slice(None))] == [0, 1, 2]
    embedding, *_ = surgery.select(lm, "token_embedding")
    assert embedding.block is None
    assert embedding.shape == (None, None, 32)
    assert "token_embedding" in repr(embedding)
    assert "block 2" in repr(surgery.select(lm, 2))


@deep_families
def test_calls_of_one_layer(family):
    lm = original(family)
    twice = surgery.repeat_blocks(lm, 0)
    name = lm.backbone.blocks[0].name
    assert names(twice, name) == [name, f"{name}_1"]
    assert names(twice, lm.backbone.blocks[0]) == [name, f"{name}_1"]
    assert names(twice, 1) == [f"{name}_1"]
    assert [site.call for site in surgery.select(twice, name)] == [0, 1]


@deep_families
def test_sites_have_names_of_their_own(family):
    """Also where a layer is called as a second call would be."""
    lm = original(family)
    name = lm.backbone.blocks[0].name
    edited = surgery.insert_after(
        surgery.repeat_blocks(lm, 0, times=3),
        2,
        keras.layers.Rescaling(0.5, name=f"{name}_1"),
    )
    assert names(edited, slice(0, 3)) == [name, f"{name}_2", f"{name}_3"]
    every = names(edited, keras.Operation)
    assert len(set(every)) == len(every)
    assert names(edited, f"{name}_1") == [f"{name}_1"]
    taps = surgery.tap(edited, keras.layers.Layer).backbone.taps
    assert len(set(taps)) == len(taps)


NOTHING = {
    "a name": "no_such_layer",
    "a pattern": "no_such_*",
    "a regular expression": re.compile("no such"),
    "a class": keras.layers.Conv1D,
    "an index": 3,
    "a negative index": -4,
    "a slice": slice(3, None),
    "a predicate": lambda layer: False,
    "a list": [],
    "a layer": keras.layers.Dense(3),
}


@in_turn("kind", NOTHING)
def test_nothing_selected(family, kind):
    with pytest.raises(ValueError, match="which selects nothing") as error:
        surgery.select(original(family), NOTHING[kind])
    assert "3 decoder blocks" in str(error.value)
    assert "token_embedding" in str(error.value)


@deep_families
def test_sites_of_another_model(family):
    lm = original(family)
    edited = surgery.remove(lm, 0)
    with pytest.raises(ValueError, match="selects nothing"):
        surgery.select(edited, surgery.select(lm, 1))


@in_turn("where", [None, 1.5, True, b"x"])
def test_where_of_the_wrong_type(family, where):
    with pytest.raises(ValueError, match="Expected `where` to be a layer"):
        surgery.select(original(family), where)
