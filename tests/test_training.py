"""Training in a `keras.RematScope`, which computes activations again."""

import keras
import numpy as np
import pytest

from tests.families import every_family
from tests.families import padding_mask
from tests.families import random_tokens

INPUTS = {
    "token_ids": random_tokens(4, 8),
    "padding_mask": padding_mask([8, 5, 8, 3], 8),
}
LABELS = np.roll(INPUTS["token_ids"], -1, axis=1)


def upstreams_losses(lm, epochs=3):
    """Of a model of upstream, if it can be trained in a scope at all."""
    try:
        return losses(lm, epochs)
    except Exception as e:
        # On JAX, Keras traces the `training` argument of what it checkpoints.
        pytest.skip(f"upstream's own model fails: {type(e).__name__}")


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


@every_family
@pytest.mark.parametrize("mode", ["full", "list_of_layers"])
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
    upstreams = upstreams_losses(family.upstream("CausalLM")(upstream, None))
    results = [
        losses(family.ours("CausalLM")(plain, None)),
        losses(family.ours("CausalLM")(ours, None)),
        upstreams,
    ]
    if keras.config.backend() != "tensorflow":
        # There, Keras' checkpointing changes the losses of upstream's, too.
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    np.testing.assert_allclose(results[1], results[2], rtol=1e-5)
    assert results[1][-1] < results[1][0]


@every_family
def test_generating_in_between(family):
    """Checkpointed blocks have caches, too."""
    with keras.RematScope(mode="full"):
        backbone = family.backbone()
        lms = (
            family.ours("CausalLM")(backbone, None),
            family.upstream("CausalLM")(
                family.upstream_backbone(backbone), None
            ),
        )
    mask = padding_mask([3, 5, 4, 3], 8)
    prompts = {"token_ids": INPUTS["token_ids"] * mask, "padding_mask": mask}
    for _ in range(2):
        tokens = []
        for lm in reversed(lms):
            train = losses if lm is lms[0] else upstreams_losses
            train(lm, epochs=1)
            output = lm.generate(prompts, stop_token_ids=None)
            tokens.append(output["token_ids"])
        np.testing.assert_array_equal(*tokens)
