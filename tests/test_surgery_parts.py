"""Sites inside decoder blocks: attention, feed-forward, and what is between."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_nlp_cache import surgery
from tests.edits import cached_forward
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import original
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import compiled
from tests.families import deep_families
from tests.families import divided
from tests.families import each_kind_that_attends
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import to_numpy

PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}
PARTS = ("attention", "feedforward", "residual")


def assert_close(x, y):
    np.testing.assert_allclose(x, y, atol=5e-5, rtol=5e-4)


def taps_of(backbone, *where):
    """What a backbone returns of its parts, as arrays by short names."""
    tapped = surgery.tap(backbone, [f"block.1.{x}" for x in where] + [0, 1])
    _, taps = tapped({"token_ids": TOKENS})
    first, second = (block.name for block in backbone.blocks[:2])
    taps = {name: to_numpy(x) for name, x in taps.items()}
    names = {"input": first, "output": second}
    names |= {x: f"{second}.{x}" for x in where}
    return {short: taps[name] for short, name in names.items()}


def layer_of(backbone, part):
    (found,) = surgery.select(backbone, f"block.1.{part}")
    return found.layer


def block_output(backbone, x):
    """What the second block returns, of the sum of its parts."""
    block = backbone.blocks[1]
    if not hasattr(block, "layer_scalar"):
        return x
    node = block._inbound_nodes[0]
    of_layer = keras.Model(
        backbone.input, node.arguments.kwargs["per_layer_input"]
    )
    mask = np.ones_like(TOKENS)
    gate = of_layer(
        {"token_ids": TOKENS, "padding_mask": mask, "position_ids": mask}
    )
    x = ops.convert_to_tensor(x)
    y = ops.gelu(block.per_layer_input_gate(x), approximate=True) * gate
    y = block.post_per_layer_input_norm(block.per_layer_up_proj(y))
    return to_numpy((x + y) * block.layer_scalar)


def in_one_stream(block, taps):
    """What a block of Gemma 3n does in the stream that its branches are of."""
    x = {name: ops.convert_to_tensor(y) for name, y in taps.items()}
    predictions = block.altup.predict(x["input"])
    second = x["residual"] + block.laurel(x["attention.norm"])
    second = second / 2**0.5
    # The first stream gets nothing of what blocks get for each token.
    corrected = block.altup.correct(predictions, second + x["feedforward"])
    assert_close(to_numpy(corrected[0]), taps["output"][0])
    return {
        **taps,
        "input": to_numpy(predictions[0]),
        "second": to_numpy(second),
        "output": taps["residual"] + taps["feedforward"],
    }


@deep_families
def test_selection(family):
    backbone = original(family).backbone
    names = [block.name for block in backbone.blocks]

    def selected(where):
        return [x.name for x in surgery.select(backbone, where)]

    for part in (*PARTS, "feedforward.down", "attention.query"):
        expected = [f"{name}.{part}" for name in names]
        assert selected(f"block.*.{part}") == expected
        assert selected(f"block.[02].{part}") == expected[::2]
        assert selected(f"block.-1.{part}") == expected[-1:]
        assert selected(f"{names[1]}.{part}") == expected[1:2]
        assert selected(surgery.select(backbone, f"*.{part}")) == expected
        # In the order of the graph, together with blocks.
        both = selected([f"block.1.{part}", slice(None)])
        assert both == [*names[:2], expected[1], names[2]]
    assert f"{names[0]}.attention.weights" in selected("block.0.attention.*")
    # A pattern without a dot is about layers of the graph.
    assert not any("." in name for name in selected("*"))
    with pytest.raises(ValueError, match=r"'feedforward\.up'.*block\.0\.nose"):
        surgery.select(backbone, "block.0.nose")


@each_kind_that_attends
def test_taps(family):
    """The parts add up to the block, with a cache and without."""
    backbone = original(family).backbone
    taps = taps_of(backbone, *PARTS, "attention.norm", "feedforward.norm")
    if family.name == "gemma3n":
        taps = in_one_stream(backbone.blocks[1], taps)
    assert_close(taps["residual"], taps["input"] + taps["attention"])
    total = taps["residual"] + taps["feedforward"]
    assert_close(taps["output"], block_output(backbone, total))
    # GPT-NeoX has its branches side by side.
    second = "input" if family.name == "gpt_neo_x" else "residual"
    second = "second" if family.name == "gemma3n" else second
    for branch, start in (("attention", "input"), ("feedforward", second)):
        norm = layer_of(backbone, f"{branch}.norm")
        expected = to_numpy(norm(ops.convert_to_tensor(taps[start])))
        assert_close(taps[f"{branch}.norm"], expected)

    tapped = surgery.tap(backbone, ["block.*.*", 2])
    _, whole = tapped({"token_ids": TOKENS})
    cache, pieces = tapped.make_cache(2, LENGTH), []
    for at, size in ((0, 5), (5, 3)):
        now = {"token_ids": TOKENS[:, at : at + size]}
        now |= {"cache": cache, "cache_update_index": at}
        _, cache, some = tapped(now)
        pieces.append(some)
    assert whole.keys() == set(tapped.taps)
    for name, x in whole.items():
        axis = 2 if name.endswith("weights") else 1
        if x.shape[0] != len(TOKENS):
            axis = 2  # There are several streams.
        together = [to_numpy(piece[name]) for piece in pieces]
        assert_close(np.concatenate(together, axis=axis), to_numpy(x))


@each_kind_that_attends
def test_attention_weights(family):
    """They are those by which the values are summed."""
    backbone = original(family).backbone
    mask = padding_mask([5, 8], LENGTH)
    attention = getattr(backbone.blocks[1], backbone.blocks[1].attention_name)
    projections = [x for x in attention.projections if x != "output"]
    where = ["weights", projections[-1]]
    tapped = surgery.tap(backbone, [f"block.1.attention.{x}" for x in where])
    _, taps = tapped({"token_ids": TOKENS, "padding_mask": mask})
    name = backbone.blocks[1].name
    weights, value = (to_numpy(taps[f"{name}.attention.{x}"]) for x in where)
    # Where there is one projection to all three, the value is its end. Where
    # there are no heads in what is projected, they lie in a row.
    head_dim = attention.key_value_shape[1]
    value = value.reshape(2, LENGTH, -1, value.shape[-1])
    if len(attention.projections) == 4:
        value = value.reshape(2, LENGTH, -1, head_dim)
    value = value[..., -head_dim:]
    norm = getattr(attention, "value_norm", getattr(attention, "v_norm", None))
    if norm is not None:
        value = to_numpy(norm(ops.convert_to_tensor(value)))
    if attention.sink is None:
        assert_close(weights.sum(axis=-1), np.ones(weights.shape[:-1]))
    else:
        assert weights.sum(axis=-1).max() < 0.999
    assert weights.shape[2:] == (LENGTH, LENGTH)
    assert np.abs(np.triu(weights, 1)).max() == 0
    assert np.abs(weights[0, :, :, 5:]).max() == 0
    heads = weights.shape[1] // value.shape[2]
    value = np.repeat(value, heads, axis=2)
    summed = np.einsum("bhts,bshd->bthd", weights, value)
    merged = to_numpy(attention.merge_heads(ops.convert_to_tensor(summed)))
    taps = surgery.tap(backbone, "block.1.attention.output")(
        {"token_ids": TOKENS, "padding_mask": mask}
    )[1]
    (expected,) = taps.values()
    assert_close(merged[mask == 1], to_numpy(expected)[mask == 1])


@deep_families
def test_weights_with_a_sink(family):
    backbone = original(family).backbone
    sunk = surgery.add_attention_sink(backbone, 1, initial=50.0)
    _, taps = surgery.tap(sunk, "block.1.attention.weights")(
        {"token_ids": TOKENS}
    )
    (weights,) = (to_numpy(x) for x in taps.values())
    assert (weights.sum(axis=-1) < 0.99).all()
    assert_close(
        full_forward(surgery.tap(sunk, "block.1.attention.weights")),
        full_forward(sunk),
    )


@deep_families
def test_inserted_after(family):
    """A factor on each part shows where it should, and nowhere else."""
    backbone = original(family).backbone
    before = taps_of(backbone, *PARTS)
    for part in PARTS:
        layer = keras.layers.Rescaling(3.0)
        edited = surgery.insert_after(backbone, f"block.1.{part}", layer)
        taps = taps_of(edited, *PARTS)
        assert_close(taps[part], 3 * before[part])
        assert_close(taps["output"], taps["residual"] + taps["feedforward"])
        if part != "residual":
            assert_close(taps["residual"], taps["input"] + taps["attention"])
        else:
            assert_close(taps["attention"], before["attention"])
        if part == "feedforward":
            assert_close(taps["residual"], before["residual"])


@deep_families
def test_inserted_before(family):
    backbone = original(family).backbone
    for part in ("attention", "feedforward"):
        layer = keras.layers.Rescaling(3.0)
        edited = surgery.insert_before(backbone, f"block.1.{part}", layer)
        norm = f"{part}.norm"
        before, after = taps_of(backbone, norm), taps_of(edited, norm)
        assert_close(after[norm], 3 * before[norm])
    layer = keras.layers.Rescaling(3.0)
    edited = surgery.insert_before(backbone, "block.1.residual", layer)
    same = surgery.insert_after(backbone, "block.1.attention", layer)
    assert_close(full_forward(edited), full_forward(same))


@deep_families
def test_removed(family):
    backbone = original(family).backbone
    taps = taps_of(surgery.remove(backbone, "block.1.attention"), *PARTS)
    assert np.abs(taps["attention"]).max() == 0
    assert_close(taps["residual"], taps["input"])
    assert_close(taps["output"], taps["residual"] + taps["feedforward"])

    pruned = surgery.remove(backbone, "block.1.feedforward")
    assert len(pruned.weights) < len(backbone.weights)
    taps = taps_of(pruned, *PARTS)
    assert np.abs(taps["feedforward"]).max() == 0
    assert_close(taps["output"], taps["residual"])

    taps = taps_of(surgery.remove(backbone, "block.1.residual"), *PARTS)
    assert_close(taps["residual"], taps["attention"])
    nothing = surgery.remove(
        backbone, ["block.*.attention", "block.*.feedforward"]
    )
    norm, embedded = backbone.layers[-1], taps_of(nothing)["input"]
    assert_close(
        full_forward(nothing),
        to_numpy(norm(ops.convert_to_tensor(embedded))),
    )


@deep_families
def test_replaced(family):
    backbone = original(family).backbone
    for branch in ("attention", "feedforward"):
        double = keras.layers.Rescaling(2.0)
        edited = surgery.replace(backbone, f"block.1.{branch}", double)
        taps = taps_of(edited, *PARTS, f"{branch}.norm")
        assert_close(taps[branch], 2 * taps[f"{branch}.norm"])
        assert_close(taps["output"], taps["residual"] + taps["feedforward"])
    double = keras.layers.Rescaling(2.0)
    edited = surgery.replace(backbone, "block.1.residual", double)
    taps = taps_of(edited, *PARTS)
    assert_close(taps["residual"], 2 * taps["attention"])


def dense(layer):
    return keras.layers.Dense(32)


COMBINED = {
    "after": lambda m: surgery.insert_after(
        m, ["block.*.residual", "block.0.attention", 1], dense
    ),
    "without": lambda m: surgery.remove(
        m, ["block.0.attention", "block.1.feedforward", 2]
    ),
    "replaced": lambda m: surgery.replace(
        m, ["block.0.feedforward", "block.2.attention"], dense
    ),
    "one of two calls": lambda m: surgery.insert_after(
        surgery.repeat_blocks(m, 1), "block.2.feedforward", dense
    ),
    "several edits": lambda m: surgery.ablate_heads(
        surgery.tap(
            surgery.insert_after(
                surgery.tap(m, "block.*.attention"), "block.*.residual", dense
            ),
            ["block.*.residual", "block.0.attention.weights"],
        ),
        [0, 1],
        0,
    ),
}


@in_turn("name", divided(COMBINED))
def test_edited_inside(family, name, tmp_path):
    """Cached and uncached agree, it generates, and it is saved."""
    lm = original(family)
    edited = COMBINED[name](lm)
    full = full_forward(edited.backbone)
    assert np.abs(full - full_forward(lm.backbone)).max() > 1e-2
    assert_close(cached_forward(edited.backbone), full)
    edited.compile(sampler="greedy")
    generated = edited.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], edited)
    edited.backbone.save(tmp_path / "edited.keras")
    loaded = keras.saving.load_model(tmp_path / "edited.keras")
    assert_close(full_forward(loaded), full)
    assert loaded.taps == edited.backbone.taps


@deep_families
def test_taps_of_what_is_gone(family):
    """A block takes its taps with it."""
    tapped = surgery.tap(original(family).backbone, "block.*.residual")
    assert surgery.remove(tapped, 1).taps == (tapped.taps[0], tapped.taps[2])


@deep_families
def test_taps_symbolically(family):
    tapped = surgery.tap(original(family).backbone, "block.1.*")
    _, taps = tapped(tapped.input)
    inputs = {"token_ids": TOKENS, "padding_mask": padding_mask([5, 8], LENGTH)}
    expected = tapped(inputs)[1]
    assert taps.keys() == expected.keys()
    probe = keras.Model(tapped.input, taps)
    for name, x in probe(inputs).items():
        assert_close(to_numpy(x), to_numpy(expected[name]))
        shape = zip(taps[name].shape, x.shape, strict=True)
        assert all(a in (None, b) for a, b in shape)


@deep_families
def test_training(family):
    """Gradients reach what was inserted, and what is around it."""
    lm = surgery.insert_after(
        family.task(backbone=family.backbone(), preprocessor=None),
        "block.*.residual",
        lambda layer: keras.layers.Dense(
            32, kernel_initializer="identity", name=f"{layer.name}_inserted"
        ),
    )
    before = [to_numpy(w) for w in lm.trainable_weights]
    lm.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    lm.fit(x, np.roll(TOKENS, -1, axis=1), batch_size=2, verbose=0)
    names = [
        w.path
        for w, old in zip(lm.trainable_weights, before)
        if not np.array_equal(to_numpy(w), old)
    ]
    assert sum("inserted/kernel" in name for name in names) == 2


def test_reduced_precision():
    """The sum is that of the block, to a rounding."""
    backbone = FAMILIES[3].backbone(num_layers=3, dtype="bfloat16")
    layer = keras.layers.Rescaling(0.9, dtype="bfloat16")
    edited = surgery.insert_after(backbone, "block.*.residual", layer)
    full = full_forward(edited, call=compiled(edited))
    cached = cached_forward(edited, call=compiled(edited))
    error = np.std(cached - full)
    assert error < 0.05 * np.std(full)
