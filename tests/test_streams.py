"""Gemma 3n: several streams of hidden states, keys and values in common."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.families import compiled
from tests.families import decode
from tests.families import FAMILIES
from tests.families import random_tokens
from tests.families import to_numpy

FAMILY = next(x for x in FAMILIES if x.name == "gemma3n")
TOKENS = random_tokens(2, 10)
INPUTS = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}


def test_layers_that_read_what_others_keep_have_no_entry():
    backbone, upstream = FAMILY.pair
    cache = backbone.make_cache(2, 16)
    count = sum(int(np.prod(x.shape)) for x in tree.flatten(cache))
    # Upstream's has a place for each of its layers.
    per_layer = 2 * 2 * upstream.num_key_value_heads * 16 * upstream.head_dim
    assert count == 2 * per_layer
    assert len(backbone.blocks) == 3


def test_policies(monkeypatch):
    """What is read by others is what attention reads, not what is kept."""
    monkeypatch.setattr("keras_nlp_cache.cache.policies.rotating.SPARE", 16)
    backbone, _ = FAMILY.pair
    token_ids = random_tokens(2, 40)
    full = to_numpy(compiled(backbone)({"token_ids": token_ids}))
    for policy, error in (("rotating", 1e-5), ("int8", 0.1)):
        cache, index = backbone.make_cache(2, 40, policy=policy), 0
        found = []
        for size in (24, 8, 1, 7):
            now = token_ids[:, index : index + size]
            x, cache = compiled(backbone)(
                {"token_ids": now, "cache": cache, "cache_update_index": index}
            )
            found.append(to_numpy(x))
            index += size
        found = np.concatenate(found, axis=1)
        assert np.abs(found - full).max() < error * np.abs(full).max()


def test_a_cache_of_another_dtype_is_not_cast():
    backbone, _ = FAMILY.pair
    full = to_numpy(compiled(backbone)(INPUTS))
    for dtype in ("bfloat16", "float32"):
        cached = decode(backbone, TOKENS, (7, 3), dtype=dtype)
        tolerance = 0.2 if dtype == "bfloat16" else 1e-5
        assert np.abs(cached - full).max() < tolerance


def test_blocks_that_are_read_stay():
    backbone, _ = FAMILY.pair
    with pytest.raises(ValueError, match="those of an earlier block. Received"):
        surgery.remove(backbone, 0)
    shallow = surgery.remove(backbone, slice(2, None))
    assert len(shallow.blocks) == len(shallow.cache_spec) == 2
    np.testing.assert_allclose(
        decode(shallow, TOKENS, (7, 3)),
        to_numpy(shallow(INPUTS)),
        atol=1e-5,
    )


def test_a_direction_is_added_to_all_streams():
    backbone, _ = FAMILY.pair
    vector = surgery.ControlVector({1: np.ones(32)}, model_hint="gemma3n")
    full = to_numpy(backbone(INPUTS))
    steered = to_numpy(vector.apply(backbone, strength=[0.0, 1.0])(INPUTS))
    np.testing.assert_allclose(steered[0], full[0], atol=1e-5)
    assert np.abs(steered[1] - full[1]).max() > 1e-2
    site = surgery.select(backbone, 1)[0]
    assert site.shape == (4, None, None, 32)


def test_logits_follow_the_embedding():
    lm = FAMILY.task(FAMILY.backbone())
    before = to_numpy(lm(INPUTS))
    embedding = lm.backbone.token_embedding.embedding.embeddings
    embedding.assign(ops.multiply(embedding, -1.0))
    after = to_numpy(lm(INPUTS))
    hidden_states = lm.backbone(INPUTS)
    cap = lm.backbone.language_model.final_logit_soft_cap
    expected = ops.matmul(hidden_states, ops.transpose(embedding)) / cap
    np.testing.assert_allclose(
        after, to_numpy(cap * ops.tanh(expected)), atol=1e-4
    )
    assert np.abs(after - before).max() > 1e-2


def test_it_is_called_with_a_list_as_upstream():
    ours, upstream = FAMILY.pair
    given = [ops.convert_to_tensor(x) for x in INPUTS.values()]
    np.testing.assert_allclose(
        to_numpy(ours(given)), to_numpy(upstream(given)), atol=1e-5
    )
    layer = keras.Model(ours.input, ours.language_model.output)
    np.testing.assert_allclose(
        to_numpy(layer(INPUTS)), to_numpy(ours(INPUTS)), atol=1e-5
    )


def test_an_edited_model_and_a_session_are_saved(tmp_path):
    """As others are: with a block that is new, and by what layers say."""
    lm, inputs = FAMILY.text_lm(), {**INPUTS, "token_ids": TOKENS % 50}
    block = lm.backbone.blocks[0]
    new = type(block).from_config({**block.get_config(), "name": "new"})
    edited = surgery.insert_after(lm, 0, new)
    full = to_numpy(edited.backbone(inputs))
    edited.backbone.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras")
    np.testing.assert_allclose(to_numpy(loaded(inputs)), full, atol=1e-5)
    session = lm.start_session()
    session.send("the fox", 3, None)
    session.save(tmp_path / "session.safetensors")
    again = lm.start_session(tmp_path / "session.safetensors")
    assert again.send("the dog", 3, None) == session.send("the dog", 3, None)
