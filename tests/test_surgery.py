"""An edited graph is what runs, with a cache and without, and generates."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

from keras_nlp_cache import surgery
from keras_nlp_cache.layers.sharing import attributes
from tests.edits import assert_unchanged
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import new
from tests.edits import original
from tests.edits import snapshot
from tests.edits import SPLIT
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import compiled
from tests.families import deep_families
from tests.families import deep_suites
from tests.families import divided
from tests.families import each_kind
from tests.families import examples
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import to_numpy

PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}
every_edit = pytest.mark.parametrize("edit", divided(EDITS))


def assert_close(x, y):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-4)


@deep_families
@every_edit
def test_edit(family, edit):
    lm = original(family)
    before = snapshot(lm)
    edited = EDITS[edit].apply(lm)

    assert type(edited) is type(lm)
    assert type(edited.backbone) is type(lm.backbone)
    assert len(edited.backbone.make_cache(2, LENGTH)) == EDITS[edit].caches
    assert len(edited.backbone.blocks) == EDITS[edit].caches
    full = full_forward(edited.backbone)
    assert_close(cached_forward(edited.backbone), full)
    changed = np.abs(full - before["outputs"]).max() > 1e-3
    assert changed == (edit != "tap")

    # What is shared is the same variable, not a copy.
    ours = {id(w) for w in lm.weights}
    shared = [w for w in edited.weights if id(w) in ours]
    assert {w.path for w in shared} >= {
        w.path for w in lm.weights if "embedding" in w.path
    }
    assert_unchanged(before, snapshot(lm))


@in_turn("edit", divided(EDITS))
def test_edit_generates(family, edit):
    edited = EDITS[edit].apply(original(family))
    edited.compile(sampler="greedy")
    generated = edited.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], edited)


@deep_families
def test_padding_of_an_edited_model(family):
    """The padding mask reaches blocks that are called without one."""
    backbone = surgery.rewire(
        original(family).backbone,
        lambda layer, x, *args, **kwargs: (
            layer(x) if "layer_" in layer.name else layer(x, *args, **kwargs)
        ),
    )
    mask = padding_mask([3, 8], LENGTH)
    full = full_forward(backbone, padding_mask=mask)
    expected = full_forward(original(family).backbone, padding_mask=mask)
    np.testing.assert_array_equal(full, expected)
    assert_close(
        cached_forward(backbone, padding_mask=mask)[mask == 1],
        full[mask == 1],
    )


@each_kind
def test_edited_to_nothing_new(family):
    """A rewiring that calls every layer gives the model again."""
    lm = original(family)
    same = surgery.rewire(lm, lambda layer, *args, **kw: layer(*args, **kw))
    assert [w.path for w in same.weights] == [w.path for w in lm.weights]
    assert all(v is w for v, w in zip(same.weights, lm.weights))
    np.testing.assert_array_equal(
        full_forward(same.backbone), full_forward(lm.backbone)
    )
    assert attributes(same.backbone).keys() >= attributes(lm.backbone).keys()


@deep_families
def test_a_block_called_twice_has_two_caches(family):
    backbone = original(family).backbone
    twice = surgery.repeat_blocks(backbone, 1, times=3)
    assert [site.name for site in surgery.select(twice, slice(None))] == [
        f"{backbone.blocks[0].name}",
        f"{backbone.blocks[1].name}",
        f"{backbone.blocks[1].name}_1",
        f"{backbone.blocks[1].name}_2",
        f"{backbone.blocks[2].name}",
    ]
    _, cache, *_ = twice(
        {
            "token_ids": TOKENS,
            "cache": twice.make_cache(2, LENGTH),
            "cache_update_index": 0,
        }
    )
    keys = [to_numpy(key) for key, _ in cache]
    for i in range(1, 4):
        assert np.abs(keys[i] - keys[i + 1]).max() > 1e-3
    # One of the calls can be edited alone.
    one = surgery.remove(twice, surgery.select(twice, 2))
    two = surgery.repeat_blocks(backbone, 1)
    np.testing.assert_array_equal(full_forward(one), full_forward(two))
    ablated = surgery.ablate_heads(two, 2, 0)
    assert len({id(block) for block in ablated.blocks}) == BLOCKS + 1
    assert_close(cached_forward(ablated), full_forward(ablated))


@deep_families
def test_blocks_side_by_side(family):
    """Blocks in parallel branches, one of them new, have a cache each."""
    backbone = original(family).backbone
    first, second, third = backbone.blocks
    added = new(first)

    def branch(layer, x, *args, **kwargs):
        y = layer(x, *args, **kwargs)
        return y + third(x) + added(x) if layer is second else y

    edited = surgery.rewire(backbone, branch)
    assert edited.blocks == [first, second, third, added, third]
    full = full_forward(edited)
    assert_close(cached_forward(edited), full)
    loaded = type(edited).from_config(edited.get_config())
    loaded.set_weights(edited.get_weights())
    names = [block.name for block in edited.blocks]
    assert [block.name for block in loaded.blocks] == names
    assert_close(full_forward(loaded), full)
    without = surgery.remove(edited, 3)
    assert without.blocks == [first, second, third, third]


@deep_families
def test_taps(family):
    backbone = original(family).backbone
    blocks = surgery.tap(backbone, slice(None))
    _, taps = blocks({"token_ids": TOKENS})
    assert list(taps) == [block.name for block in backbone.blocks]
    _, cache, cached_taps = blocks(
        {
            "token_ids": TOKENS,
            "cache": blocks.make_cache(2, LENGTH),
            "cache_update_index": 0,
        }
    )
    assert len(cache) == BLOCKS
    for i, name in enumerate(taps):
        # The norm stays where it is, so a tap is what it would get.
        early = surgery.keep_blocks(backbone, slice(0, i + 1))
        norm = backbone.layers[-1]
        assert_close(to_numpy(norm(taps[name])), full_forward(early))
        assert_close(to_numpy(cached_taps[name]), to_numpy(taps[name]))
    # A later edit shows in them, and they stay where they are.
    doubled = surgery.insert_after(
        blocks, 0, keras.layers.Rescaling(2.0, name="doubled")
    )
    _, later = doubled({"token_ids": TOKENS})
    first = backbone.blocks[0].name
    assert_close(to_numpy(later[first]), 2 * to_numpy(taps[first]))
    assert doubled.taps == blocks.taps


@deep_families
def test_taps_symbolically(family):
    tapped = surgery.tap(original(family).backbone, 1)
    _, taps = tapped(tapped.input)
    probe = keras.Model(tapped.input, next(iter(taps.values())))
    inputs = {"token_ids": TOKENS, "padding_mask": padding_mask([5, 8], LENGTH)}
    expected = tapped(inputs)[1]
    assert_close(to_numpy(probe(inputs)), to_numpy(*expected.values()))


@deep_families
def test_activations_as_of_a_functional_model(family):
    """`layer.output` belongs to the model in which the layer was new."""

    def run(inputs, outputs):
        model = keras.Model(inputs, outputs)
        return {name: to_numpy(x) for name, x in model(PROMPTS).items()}

    model = original(family).backbone
    block = model.blocks[1]
    before = run(model.input, {"x": block.output})["x"]
    edited = surgery.insert_after(
        model, 0, keras.layers.Rescaling(0.5, name="half")
    )
    _, taps = surgery.tap(edited, "*")(PROMPTS)
    expected = {name: to_numpy(x) for name, x in taps.items()}
    half = edited.get_layer("half").output
    for inputs in (edited.input, edited.inputs):
        x = run(inputs, {"half": half, "output": edited.output})
        assert_close(x["half"], expected["half"])
        assert_close(x["output"], full_forward(edited, **PROMPTS))
    # Of a layer that is in both it stays what it was, and is never mistaken.
    assert edited.get_layer(block.name) is block
    assert_close(run(model.input, {"x": block.output})["x"], before)
    for inputs, output in ((edited.input, block.output), (model.input, half)):
        with pytest.raises(ValueError, match='"token_ids" is used 2 times'):
            keras.Model(inputs, output)
    # Where there is but the edited model, all layers are its own.
    loaded = type(edited).from_config(edited.get_config())
    loaded.set_weights(edited.get_weights())
    outputs = {x.name: x.output for x in loaded.layers if x.name in expected}
    assert len(outputs) > BLOCKS
    for name, x in run(loaded.input, outputs).items():
        assert_close(x, expected[name])


@deep_families
def test_replaced_layers_are_attributes(family):
    """What turns hidden states into logits follows the embedding."""
    lm = original(family)
    config = lm.backbone.token_embedding.get_config()
    config["name"] = "another_embedding"
    embedding = type(lm.backbone.token_embedding).from_config(config)
    edited = surgery.replace(lm, "token_embedding", embedding)
    assert edited.backbone.token_embedding is embedding
    assert lm.backbone.token_embedding is not embedding
    paths = {w.path for w in edited.weights}
    assert not any(path.startswith("token_embedding/") for path in paths)
    edited.compile(sampler="greedy")
    generated = edited.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], edited)


@in_turn("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
def test_reduced_precision(family, dtype):
    """Rounding is not taken for a layer that mixes positions."""
    backbone = family.backbone(num_layers=BLOCKS, dtype=dtype)
    for edit in ("rewire", "add_lora", "add_attention_sink"):
        backbone = EDITS[edit].apply(backbone)
    # JAX does not compile upstream's attention in float16 on a CPU.
    call = backbone if dtype == "float16" else compiled(backbone)
    full = full_forward(backbone, call=call)
    cached = cached_forward(backbone, call=call)
    assert np.std(cached - full) < 0.05 * np.std(full)


@functools.cache
def as_made(family):
    """What a model that is only edited returns before and ever after."""
    return full_forward(original(family).backbone)


COMPOSABLE = [name for name in EDITS if "tap" not in name]


@deep_suites
@settings(
    max_examples=examples(20),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(st.sampled_from(COMPOSABLE), min_size=2, max_size=4),
    sizes=st.permutations(SPLIT),
)
def test_edits_compose(family, names, sizes):
    backbone = original(family).backbone
    before = as_made(family)
    for name in names:
        # The edits speak of three blocks.
        if len(backbone.blocks) < BLOCKS:
            backbone = surgery.repeat_blocks(backbone, 0, times=BLOCKS)
        backbone = EDITS[name].apply(backbone)
    assert len(backbone.make_cache(2, LENGTH)) == len(backbone.blocks)
    assert_close(cached_forward(backbone, sizes), full_forward(backbone))
    np.testing.assert_array_equal(
        full_forward(original(family).backbone), before
    )
