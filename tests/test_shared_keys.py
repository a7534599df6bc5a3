"""Layers that read the keys and values of an earlier one have no entry."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

from keras_nlp_cache import models
from keras_nlp_cache import surgery
from tests.edits import cached_forward
from tests.edits import dense
from tests.edits import full_forward
from tests.edits import original
from tests.families import compiled
from tests.families import FAMILIES
from tests.families import on_one_backend
from tests.families import random_tokens
from tests.families import to_numpy

GEMMA4 = next(x for x in FAMILIES if x.name == "gemma4")


@on_one_backend("shapes are counted")
def test_what_is_shared_takes_no_memory():
    """As many bytes as those that compute keys and values say, and no more."""
    backbone, _ = GEMMA4.pair
    assert [x.entry_count for x in backbone.blocks] == [1, 1, 0]
    cache = backbone.make_cache(3, 100, zeros=keras.KerasTensor)
    shapes = [tuple(x.shape) for x in tree.flatten(cache)]
    # Of those that see all of a text, a head of another size.
    assert shapes == [(3, 2, 100, 8)] * 2 + [(3, 1, 100, 16)] * 2
    assert backbone.cache_windows == (4, None)
    # Upstream: of all layers, as wide as the widest, with as many heads.
    upstream = 3 * 2 * 100 * 2 * 16
    ours = sum(int(np.prod(x)) for x in shapes) // 3
    assert 3 * ours == upstream


@pytest.mark.parametrize("policy", ["rotating", "int8"])
def test_what_a_policy_keeps_is_shared(policy, monkeypatch):
    monkeypatch.setattr("keras_nlp_cache.cache.policies.rotating.SPARE", 4)
    backbone, _ = GEMMA4.pair
    token_ids = random_tokens(2, 24)
    full = to_numpy(compiled(backbone)({"token_ids": token_ids}))
    cache = backbone.make_cache(2, 24, policy=policy)
    call, found = compiled(backbone), []
    for at in (*range(0, 16, 8), *range(16, 24)):
        x, cache = call(
            {
                "token_ids": token_ids[:, at : at + (8 if at < 16 else 1)],
                "cache": cache,
                "cache_update_index": at,
            }
        )
        found.append(to_numpy(x))
    found = np.concatenate(found, axis=1)
    if policy == "rotating":
        np.testing.assert_allclose(found, full, atol=1e-4, rtol=1e-4)
    else:
        error = np.linalg.norm(found - full) / np.linalg.norm(full)
        assert 0 < error < 0.03


@on_one_backend("what is refused does not depend on one")
@pytest.mark.parametrize(
    "edit",
    [
        lambda m: surgery.remove(m, 0),
        lambda m: surgery.replace(m, 0, dense),
        lambda m: surgery.replace(m, "block.0.attention", dense),
        lambda m: surgery.keep_blocks(m, [1, 2]),
    ],
)
def test_edits_by_which_others_would_have_nothing_to_read(edit):
    backbone = original(GEMMA4).backbone
    last = backbone.blocks[-1].name
    with pytest.raises(ValueError, match=f"`shared_kv` for '{last}'.*edit"):
        edit(backbone)


@on_one_backend("what is asked of the graph does not depend on one")
def test_edits_of_those_that_share():
    """What others read is what an edit makes of it."""
    backbone = original(GEMMA4).backbone
    before = full_forward(backbone)
    for edited, entries in (
        (surgery.remove(backbone, -1), 2),
        (surgery.remove(backbone, 1), 1),
        (surgery.remove(backbone, "block.2.attention"), 2),
        (surgery.repeat_blocks(backbone, 2), 2),
        (surgery.repeat_blocks(backbone, 0), 3),
    ):
        assert len(edited.cache_spec) == entries
        full = full_forward(edited)
        assert np.abs(full - before).max() > 1e-3
        np.testing.assert_allclose(
            cached_forward(edited), full, atol=5e-5, rtol=5e-4
        )


@on_one_backend("what is read does not depend on one")
def test_positions_under_both_names():
    backbone, _ = GEMMA4.pair
    token_ids, positions = random_tokens(1, 4), np.array([[3, 4, 5, 6]])
    inputs = {
        "token_ids": token_ids,
        "cache": backbone.make_cache(1, 4),
        "cache_update_index": 0,
    }
    one, other = (
        to_numpy(backbone({**inputs, name: positions})[0])
        for name in ("position_ids", "token_positions")
    )
    np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="Received both.*\\(1, 4\\)"):
        backbone(
            {**inputs, "position_ids": positions, "token_positions": positions}
        )


@on_one_backend("constructors are upstream's")
def test_models_that_do_not_generate():
    config = dict(GEMMA4.config)
    with pytest.raises(ValueError, match="`use_bidirectional_attention`"):
        models.Gemma4Backbone(**config, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="embeddings are keras_hub's"):
        models.Gemma4Backbone(
            **config,
            is_embedding_model=True,
            embedding_dim=8,
            pooling_intermediate_dim=8,
        )


def test_experts_beside_a_dense_network():
    """Those that tokens chose are computed, and what was not, is not read."""
    backbone = GEMMA4.backbone(
        enable_moe_block=True,
        num_experts=8,
        expert_intermediate_dim=12,
        num_experts_per_token=2,
    )
    token_ids = random_tokens(1, 6)
    full = to_numpy(compiled(backbone)({"token_ids": token_ids}))
    cache = backbone.make_cache(1, 6)
    found, chosen = [], []
    for at, size in ((0, 3), (3, 1), (4, 1), (5, 1)):
        x, cache = backbone(
            {
                "token_ids": token_ids[:, at : at + size],
                "cache": cache,
                "cache_update_index": at,
            }
        )
        found.append(to_numpy(x))
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, full, atol=1e-4, rtol=1e-4)
    # A step is the same with what it did not choose spoiled.
    step = {
        "token_ids": token_ids[:, -1:],
        "cache": cache,
        "cache_update_index": 5,
    }
    bank = backbone.blocks[0].moe_expert_bank
    kept = ops.convert_to_numpy(bank.down_proj)
    for expert in range(8):
        spoiled = kept.copy()
        spoiled[expert] = np.nan
        bank.down_proj.assign(spoiled)
        if np.isnan(to_numpy(backbone(step)[0])).any():
            chosen.append(expert)
    bank.down_proj.assign(kept)
    assert len(chosen) == 2
