"""Training in a `keras.RematScope`, which computes activations again."""

import keras
import numpy as np
import pytest

from tests.families import deep_families
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens

INPUTS = {
    "token_ids": random_tokens(4, 8),
    "padding_mask": padding_mask([8, 5, 8, 3], 8),
}
LABELS = np.roll(INPUTS["token_ids"], -1, axis=1)


def upstreams_losses(lm, epochs=3):
    """Of a model of upstream, `None` where JAX cannot train it in a scope.

    There, Keras traces the `training` argument of what it computes again, and
    layers that ask for its value fail.
    """
    if keras.config.backend() != "jax":
        return losses(lm, epochs)
    try:
        return losses(lm, epochs)
    except RuntimeError as e:
        assert "_error_repr" in str(e)
        return None


def losses(lm, epochs=3):
    lm.compile(
        optimizer=keras.optimizers.SGD(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # Keras' checkpointing on TensorFlow works eagerly alone.
        run_eagerly=keras.config.backend() == "tensorflow",
        sampler="greedy",
    )
    return lm.fit(
        INPUTS,
        LABELS,
        sample_weight=INPUTS["padding_mask"].astype("float32"),
        batch_size=2,
        shuffle=False,
        epochs=epochs,
        verbose=0,
    ).history["loss"]


@in_turn("mode", ["list_of_layers", "full", "list_of_layers", "full"])
def test_gradient_checkpointing(family, mode):
    """The same losses, step by step, as upstream's and as without."""
    plain = family.backbone()
    weights = plain.get_weights()
    names = [block.name for block in plain.blocks]
    with keras.RematScope(mode=mode, layer_names=names):
        ours = family.backbone()
        upstream = family.upstream_backbone(ours)
    ours.set_weights(weights)
    upstream.set_weights(weights)
    upstreams = upstreams_losses(family.upstream_task(upstream, None))
    if upstreams is None and mode == "full":
        pytest.skip("JAX traces `training` in layers of Keras and keras_hub")
    results = [
        losses(family.task(plain, None)),
        losses(family.task(ours, None)),
    ]
    if keras.config.backend() != "tensorflow":
        # There, Keras' checkpointing changes the losses of upstream's, too.
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    if upstreams is not None:
        np.testing.assert_allclose(results[1], upstreams, rtol=1e-5)
    assert results[1][-1] < results[1][0]


@deep_families
def test_generating_in_between(family):
    """Checkpointed blocks have caches, too."""
    names = [block.name for block in family.pair[0].blocks]
    with keras.RematScope(mode="list_of_layers", layer_names=names):
        ours = family.task(backbone=family.backbone(), preprocessor=None)
    # Upstream's may neither train nor generate in a scope.
    upstream = family.upstream_task(
        family.upstream_backbone(ours.backbone), None
    )
    upstream.compile(sampler="greedy")
    mask = padding_mask([3, 5, 4, 3], 8)
    prompts = {"token_ids": INPUTS["token_ids"] * mask, "padding_mask": mask}
    for _ in range(2):
        losses(ours, epochs=1)
        upstream.set_weights(ours.get_weights())
        tokens, expected = (
            lm.generate(prompts, stop_token_ids=None)["token_ids"]
            for lm in (ours, upstream)
        )
        np.testing.assert_array_equal(tokens, expected)
