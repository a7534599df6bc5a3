"""Blocks and layers of one model in another."""

import keras
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.edits import assert_unchanged
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import hidden_states
from tests.edits import LENGTH
from tests.edits import original
from tests.edits import snapshot
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import DEEP
from tests.families import deep_families
from tests.families import divided
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import randomize
from tests.families import to_numpy
from tests.test_quantization import quantize

PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}
LLAMA = FAMILIES[3]


def donor(family, **kwargs):
    """Another task with layers of the same names and weights of its own."""
    backbone = family.backbone(num_layers=BLOCKS, **kwargs)
    randomize(backbone, seed=1)
    return family.task(backbone=backbone, preprocessor=None)


def merged(a, blocks):
    for block in blocks:
        a = surgery.insert_after(a, -1, block)
    return a


def by_hand(backbone, blocks):
    """What the blocks make of what the last block of a model returns."""
    last = backbone.blocks[-1]
    tapped = surgery.tap(backbone, BLOCKS - 1)
    _, taps = tapped({"token_ids": TOKENS})
    x = taps[last.name]
    for block in blocks:
        x = block(x)
    return to_numpy(backbone.layers[-1](x))


def assert_distinct(model):
    paths = [w.path for w in model.weights]
    assert len(set(paths)) == len(paths) == len({id(w) for w in model.weights})
    names = [layer.name for layer in getattr(model, "backbone", model).layers]
    assert len(set(names)) == len(names)


def assert_loads(model, tmp_path):
    model.save(tmp_path / "model.keras")
    model.backbone.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras_nlp_cache.load_model(tmp_path / "model.keras").backbone,
        type(model.backbone).from_preset(str(tmp_path / "preset")),
    ):
        assert [w.path for w in loaded.weights] == [
            w.path for w in model.backbone.weights
        ]
        np.testing.assert_allclose(
            full_forward(loaded), full_forward(model.backbone), atol=1e-5
        )


def assert_generates(model):
    np.testing.assert_allclose(
        cached_forward(model.backbone),
        full_forward(model.backbone),
        atol=2e-5,
        rtol=2e-4,
    )
    model.compile(sampler="greedy")
    generated = model.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], model)


@deep_families
def test_blocks(family, tmp_path):
    a, b = original(family), donor(family)
    before, before_b = snapshot(a), snapshot(b)
    blocks = b.backbone.blocks[1:3]
    model = merged(a, blocks)
    assert len(model.backbone.make_cache(1, 4)) == BLOCKS + 2
    assert_distinct(model)
    np.testing.assert_allclose(
        full_forward(model.backbone), by_hand(a.backbone, blocks), atol=1e-5
    )
    assert_generates(model)
    assert_loads(model, tmp_path)
    # Weights of their own.
    for block in model.backbone.blocks[BLOCKS:]:
        for weight in block.weights:
            weight.assign(weight * 2)
    assert_unchanged(before, snapshot(a))
    assert_unchanged(before_b, snapshot(b))


EDITED = {
    "adapters": EDITS["add_lora"].apply,
    "heads and sinks": lambda m: EDITS["ablate_heads"].apply(
        EDITS["add_attention_sink"].apply(m)
    ),
    "edited twice over": lambda m: surgery.add_lora(
        surgery.repeat_blocks(surgery.add_lora(m, 0, 2), 0), 0, 3, ["key"]
    ),
    "quantized": lambda m: quantize(m, "int8"),
    "quantized with adapters": lambda m: EDITS["add_lora"].apply(
        quantize(m, "int4")
    ),
    "LoRA of Keras": lambda m: (m.backbone.enable_lora(2), m)[1],
}


# What is inside of a block is not a family's doing, but what it is called is.
@pytest.mark.parametrize(
    "edit, family",
    divided(
        [("adapters", family) for family in DEEP]
        + [(edit, LLAMA) for edit in EDITED if edit != "adapters"]
    ),
    ids=lambda x: getattr(x, "name", x),
)
def test_edited_donors(family, edit, tmp_path):
    a, b = original(family), EDITED[edit](donor(family))
    rng = np.random.default_rng(0)
    for weight in b.weights:
        if weight.name in ("up", "lora_kernel_b"):
            weight.assign(0.3 * rng.normal(size=weight.shape))
    before, before_b = snapshot(a), snapshot(b)
    blocks = b.backbone.blocks[:2]
    model = merged(a, blocks)
    assert_distinct(model)
    expected = by_hand(a.backbone, blocks)
    full = full_forward(model.backbone)
    np.testing.assert_allclose(full, expected, atol=1e-4)
    cached = cached_forward(model.backbone)
    assert np.std(cached - full) < 0.02 * np.std(full)
    model.compile(sampler="greedy")
    generated = model.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], model)
    model.save(tmp_path / "model.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(full_forward(loaded.backbone), full, atol=1e-4)
    assert_distinct(loaded)
    # The copy is edited as it would be in its own model.
    again = surgery.add_lora(loaded, -1, 2)
    np.testing.assert_allclose(full_forward(again.backbone), full, atol=1e-4)
    assert_unchanged(before, snapshot(a))
    assert_unchanged(before_b, snapshot(b))


@deep_families
def test_blocks_of_another_family(family, tmp_path):
    """Each has a cache of its own shape."""
    a = original(family)
    b = donor(FAMILIES[0] if family is not FAMILIES[0] else LLAMA)
    model = merged(a, b.backbone.blocks[:1])
    heads = [heads for heads, _ in model.backbone.cache_spec]
    assert heads[-1] != heads[0] or family.name == "gpt2"
    np.testing.assert_allclose(
        full_forward(model.backbone),
        by_hand(a.backbone, b.backbone.blocks[:1]),
        atol=1e-5,
    )
    assert_generates(model)
    assert_loads(model, tmp_path)


@pytest.mark.parametrize("family", DEEP[0:1])
def test_replaced(family, tmp_path):
    """A block that takes the place of its namesake is shared."""
    a, b = original(family), donor(family)
    before, before_b = snapshot(a), snapshot(b)
    model = surgery.replace(a, 1, b.backbone.blocks[1])
    assert model.backbone.blocks[1] is b.backbone.blocks[1]
    assert_distinct(model)
    other = surgery.replace(a, 1, b.backbone.blocks[2])
    assert other.backbone.blocks[1] is not b.backbone.blocks[2]
    assert_distinct(other)
    for x, block in ((model, 1), (other, 2)):
        tapped = surgery.tap(x.backbone, [0, 1])
        _, taps = tapped({"token_ids": TOKENS})
        first, second = taps.values()
        np.testing.assert_allclose(
            to_numpy(b.backbone.blocks[block](first)),
            to_numpy(second),
            atol=1e-5,
        )
        assert_loads(x, tmp_path)
    assert_unchanged(before, snapshot(a))
    assert_unchanged(before_b, snapshot(b))


@pytest.mark.parametrize("family", DEEP[1:2])
def test_layers_that_are_no_blocks(family, tmp_path):
    a, b = original(family), donor(family)
    before, before_b = snapshot(a), snapshot(b)
    norm = b.backbone.layers[-1]
    inner = b.backbone.blocks[0]
    inner = next(
        x for x in inner._flatten_layers(False) if "norm" in x.name.lower()
    )
    probe = keras.layers.Dense(32, name="probe")
    own = surgery.insert_after(b, 0, probe)
    model = surgery.insert_after(a, 0, norm)
    model = surgery.insert_after(model, 1, inner)
    model = surgery.insert_after(model, 0, probe)
    model = surgery.insert_after(
        model,
        2,
        surgery.insert_after(
            b, 0, keras.layers.Dense(32, name="x")
        ).backbone.get_layer("x"),
    )
    assert probe in model.backbone.layers  # Nothing is in its way.
    assert norm not in model.backbone.layers
    assert_distinct(model)
    assert_generates(model)
    assert_loads(model, tmp_path)
    assert_unchanged(before, snapshot(a))
    assert_unchanged(before_b, snapshot(b))
    assert own.backbone.get_layer("probe") is probe


@deep_families
def test_parts_of_blocks(family, tmp_path):
    """A projection of another model, in place of one and beside it."""
    a, b = original(family), donor(family)
    before, before_b = snapshot(a), snapshot(b)
    block = b.backbone.blocks[1]
    attention = getattr(block, block.attention_name)
    query = getattr(attention, attention.projections["query"])
    model = surgery.replace_projections(
        a, slice(None), "query", lambda _: query
    )
    assert_distinct(model)
    assert_generates(model)
    assert_loads(model, tmp_path)
    assert_unchanged(before, snapshot(a))
    assert_unchanged(before_b, snapshot(b))


@pytest.mark.parametrize("family", DEEP[2:3])
def test_a_model_with_itself(family, tmp_path):
    """What the model has already stays shared, whatever it is called."""
    a = original(family)
    adapted = surgery.add_lora(a, 1, 2)
    model = surgery.insert_after(adapted, 1, a.backbone.blocks[1])
    assert len(model.weights) == len(adapted.weights)
    names = [block.name for block in model.backbone.blocks]
    assert len(set(names)) == BLOCKS + 1
    two = surgery.repeat_blocks(a, 1)
    np.testing.assert_allclose(
        full_forward(model.backbone), full_forward(two.backbone), atol=1e-5
    )
    assert_loads(model, tmp_path)
    # From one edited model to another.
    other = surgery.add_lora(a, slice(None), 3)
    model = surgery.insert_after(adapted, -1, other.backbone.blocks[1])
    assert_distinct(model)
    assert_loads(model, tmp_path)


def test_hidden_states_of_another_size():
    a = original(LLAMA)
    small = LLAMA.backbone(hidden_dim=16)
    before = snapshot(a)
    for edit in (
        lambda: surgery.insert_after(a, -1, small.blocks[1]),
        lambda: surgery.replace(a, 0, small.blocks[0]),
        lambda: surgery.rewire(
            a,
            lambda layer, x, *args, **kwargs: (
                small.blocks[0](x)
                if layer is a.backbone.blocks[0]
                else layer(x, *args, **kwargs)
            ),
        ),
    ):
        with pytest.raises(ValueError, match="of size 16.*, 32\\)"):
            edit()
    assert_unchanged(before, snapshot(a))


def test_trains():
    a, b = original(LLAMA), donor(LLAMA)
    model = merged(a, b.backbone.blocks[:1])
    for weight in a.weights:
        weight.trainable = False
    before = snapshot(b)
    model.compile(optimizer=keras.optimizers.Adam(0.02))
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    losses = model.fit(x, np.full_like(TOKENS, 7), epochs=5, verbose=0)
    for weight in a.weights:
        weight.trainable = True
    assert losses.history["loss"][-1] < losses.history["loss"][0]
    assert hidden_states(model.backbone({"token_ids": TOKENS})) is not None
    assert_unchanged(before, snapshot(b))
