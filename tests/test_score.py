"""`score()` gives upstream's scores, and sees what surgery did."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_nlp_cache import surgery
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

TOKENS, MASK = random_tokens(2, 9), padding_mask([9, 6], 9)


def score(lm, **kwargs):
    return to_numpy(lm.score(TOKENS[:, :8], MASK[:, :8], **kwargs))


@deep_families
@pytest.mark.parametrize("mode", ["logits", "loss"])
def test_equal_upstream(family, mode):
    seen = {}

    def intercept(x, index):
        seen.setdefault(index, []).append(to_numpy(x))
        # Upstream's Gemma drops what comes back for the embeddings.
        return x if index == -1 else x * 1.5 + 0.1

    for options in ({}, {"layer_intercept_fn": intercept}):
        ours, theirs = (
            score(lm, scoring_mode=mode, target_ids=TOKENS[:, 1:], **options)
            for lm in family.lm_pair
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=2e-4)
    assert sorted(seen) == [-1, 0, 1]
    for ours, theirs in seen.values():
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=2e-4)


@deep_families
def test_no_mask_and_intercepted_embeddings(family):
    ours, theirs = family.lm_pair
    np.testing.assert_allclose(
        to_numpy(ours.score(TOKENS)),
        to_numpy(theirs.score(TOKENS)),
        atol=2e-4,
        rtol=2e-4,
    )

    def intercept(x, index):
        return x * 0 if index == -1 else x

    silenced = score(ours, layer_intercept_fn=intercept)
    assert np.abs(silenced - score(ours)).max() > 1e-3


@deep_families
def test_edited_models(family):
    lm = family.lm_pair[0]
    edited = surgery.insert_after(lm, 0, keras.layers.Rescaling(0.5))
    np.testing.assert_allclose(
        to_numpy(edited.score(TOKENS)),
        to_numpy(edited({"token_ids": TOKENS, "padding_mask": TOKENS * 0 + 1})),
        atol=1e-5,
        rtol=1e-5,
    )
    assert (
        np.abs(
            to_numpy(edited.score(TOKENS)) - to_numpy(lm.score(TOKENS))
        ).max()
        > 1e-3
    )
    repeated = surgery.repeat_blocks(lm, slice(None))
    seen = []
    repeated.score(TOKENS, layer_intercept_fn=lambda x, i: seen.append(i) or x)
    assert seen == [-1, 0, 1, 2, 3]


def test_mistakes():
    lm = FAMILIES[0].lm_pair[0]
    with pytest.raises(ValueError, match="`scoring_mode`.*'both'"):
        lm.score(TOKENS, scoring_mode="both")
    with pytest.raises(ValueError, match="`target_ids`.*None"):
        lm.score(TOKENS, scoring_mode="loss")


def test_gradients_reach_what_is_intercepted():
    """What upstream's documentation shows for TensorFlow."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("takes gradients with `tf.GradientTape`")
    import tensorflow as tf

    lm = FAMILIES[0].lm_pair[0]
    watched = []

    with tf.GradientTape() as tape:

        def intercept(x, index):
            if index == -1:
                tape.watch(x)
                watched.append(x)
            return x

        loss = lm.score(
            TOKENS[:, :8],
            scoring_mode="loss",
            layer_intercept_fn=intercept,
            target_ids=TOKENS[:, 1:],
        )
    assert float(ops.max(ops.abs(tape.gradient(loss, watched[0])))) > 0
