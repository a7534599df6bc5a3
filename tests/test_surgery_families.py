"""Each family through all of surgery: one model with an edit of each kind."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from keras_nlp_cache.attention.functions import attend
from keras_nlp_cache.surgery import attention_edits
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import dense
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import original
from tests.edits import query_of
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import divided
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import to_numpy

# What repeng calls them, in the words of transformers.
MODEL_TYPES = {
    "Gemma3": "gemma3_text",
    "GPTNeoX": "gpt_neox",
    "GptOss": "gpt_oss",
    "Llama3": "llama",
    "Qwen": "qwen2",
    "QwenMoe": "qwen2_moe",
    "Qwen3Moe": "qwen3_moe",
}
# Blocks that are edited as a whole, or not at all.
WITHOUT_PARTS = ("rwkv7",)
# Blocks that no other family's go together with.
OF_THEIR_OWN = ("gemma3n",)
# Whose last blocks read the keys of earlier ones, of which one has none.
SHARING = ("gemma4",)
PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}


def assert_close(x, y):
    np.testing.assert_allclose(x, y, atol=5e-5, rtol=5e-4)


def on_families(*names):
    return pytest.mark.parametrize(
        "family",
        divided(x for x in FAMILIES if x.name in names),
        ids=lambda x: x.name,
    )


@functools.cache
def donor(family):
    """A backbone that others take a block and a norm of."""
    return family.backbone(num_layers=1)


def surgery_name(projection):
    """What the part of a block is called that is a projection."""
    return attention_edits.PROJECTIONS[projection]


def after(family):
    """The family that comes after another, in a circle, of those with parts."""
    if family.name in OF_THEIR_OWN:
        return family
    apart = WITHOUT_PARTS + OF_THEIR_OWN + SHARING
    others = [x for x in FAMILIES if x is family or x.name not in apart]
    return others[(others.index(family) + 1) % len(others)]


def norm_of(backbone):
    return surgery.select(backbone, "block.0.feedforward.norm")[0].layer


def edited_everywhere(family):
    """A task with an edit of each kind, and a block of another family."""
    lm = original(family)
    has = lm.backbone.blocks[0].part_paths
    projections = [query_of(lm), "output"]
    if "feedforward.down" in has:
        projections.append("down")
    for block in range(2):
        has = lm.backbone.blocks[block].part_paths
        here = [x for x in projections if surgery_name(x) in has]
        lm = surgery.add_lora(lm, block, 2, here)
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
    hint = MODEL_TYPES.get(family.prefix, family.prefix.lower())
    vector = surgery.ControlVector({1: rng.normal(size=32)}, hint)
    with warnings.catch_warnings():
        # It says so if a vector is for another family.
        warnings.simplefilter("error", UserWarning)
        return vector.apply(lm, 0.5)


@each_kind
def test_edited(family, tmp_path):
    if family.name in WITHOUT_PARTS:
        pytest.skip("no edit inside of a block applies: see test_states.py")
    lm = edited_everywhere(family)
    full = full_forward(lm.backbone)
    assert np.abs(full - full_forward(original(family).backbone)).max() > 1e-2
    blocks = lm.backbone.blocks
    assert len(blocks) == BLOCKS + 1
    entries = sum(block.entry_count for block in blocks)
    assert len(lm.backbone.make_cache(2, LENGTH)) == entries
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


@on_families("gpt2", "mixtral", "qwen_moe", "gpt_neo_x", "bloom")
def test_quantized(family, tmp_path):
    """Layers that Keras numbers are quantized again where they were."""
    lm = family.task(backbone=family.backbone(), preprocessor=None)
    lm.quantize("int8")
    lm = surgery.add_lora(lm, 0, 2, [query_of(lm), "output"])
    full = full_forward(lm.backbone)
    assert_close(cached_forward(lm.backbone), full)
    lm.save(tmp_path / "lm.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras").backbone
    dtypes = [(w.path, w.dtype) for w in lm.backbone.weights]
    assert [(w.path, w.dtype) for w in loaded.weights] == dtypes
    assert sum(dtype == "int8" for _, dtype in dtypes) > 8
    np.testing.assert_allclose(full_forward(loaded), full, atol=1e-5)


class Attention(keras.layers.Layer):
    """What `attend()` does, maybe without its mask."""

    def __init__(self, sees_all=False):
        super().__init__()
        self.sees_all = sees_all

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
        mask = mask * 0 if self.sees_all else mask
        return attend(
            query, key, value, mask, scale, soft_cap, dropout, sink, bias
        )

    def compute_output_shape(self, query_shape, **shapes):
        return query_shape


class FewArguments(Attention):
    def call(self, query, key, value, mask, scale, soft_cap, dropout):
        return attend(query, key, value, mask, scale, soft_cap, dropout)


@on_families("llama", "gpt_oss", "bloom", "falcon")
def test_attention_functions(family):
    """They get the sink or the biases of the family, and are checked so."""
    backbone = original(family).backbone

    def replaced(layer):
        return surgery.replace_attention(backbone, 1, lambda _: layer)

    assert_close(full_forward(replaced(Attention())), full_forward(backbone))
    assert_close(cached_forward(replaced(Attention())), full_forward(backbone))
    with pytest.raises(ValueError, match="treat each query alone"):
        replaced(Attention(sees_all=True))
    if family.name == "llama":
        same = full_forward(replaced(FewArguments()))
        return assert_close(same, full_forward(backbone))
    name = "sink" if family.name == "gpt_oss" else "bias"
    with pytest.raises(ValueError, match=f"called with .*{name}.*by name"):
        replaced(FewArguments())


@on_families("bloom")
def test_residual_behind_a_dropout(family):
    backbone = family.backbone(dropout=0.1)
    for edit in (
        surgery.tap,
        surgery.remove,
        lambda *args: surgery.insert_after(*args, dense),
    ):
        with pytest.raises(ValueError, match="dropout=0"):
            edit(backbone, "block.0.residual")
    edited = surgery.insert_after(backbone, "block.0.attention", dense)
    assert_close(cached_forward(edited), full_forward(edited))


@on_families("gpt_neo_x", "mixtral")
def test_lora_of_keras(family):
    backbone = family.backbone()
    backbone.enable_lora(2)
    trained = [w for w in backbone.trainable_weights if "lora" in w.name]
    assert len(trained) == 4 * (1 if family.name == "gpt_neo_x" else 2)


@each_kind
def test_projections(family):
    """They are called what they are: what is normalized goes up, then down."""
    backbone = original(family).backbone
    has = backbone.blocks[1].part_paths
    if "feedforward.down" not in has:
        with pytest.raises(ValueError, match=r"some of \[.*\].*has not"):
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
