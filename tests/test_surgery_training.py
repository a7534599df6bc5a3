"""Edited models train, and what they learned shows when they generate."""

import keras
import numpy as np

from keras_nlp_cache import surgery
from tests.edits import BLOCKS
from tests.edits import cached_forward
from tests.edits import dense
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import deep_families
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import to_numpy
from tests.families import XLA

PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}
LEARNED = 7


def task(family):
    """A task of its own for each test, since training changes it."""
    return family.task(
        backbone=family.backbone(num_layers=2), preprocessor=None
    )


@in_turn("edit", ["insert_after", "add_lora"])
def test_inserted_layers_train(family, edit):
    """What is compiled before the training shows it after."""
    lm = task(family)
    edited = EDITS[edit].apply(lm)
    base = {id(w) for w in lm.weights}
    assert any(id(w) not in base for w in edited.trainable_weights)
    for weight in lm.weights:
        weight.trainable = False
    before = [to_numpy(w) for w in lm.weights]

    edited.compile(
        optimizer=keras.optimizers.Adam(0.05), sampler="greedy", **XLA
    )
    untrained = edited.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    y = np.full_like(TOKENS, LEARNED)
    losses = edited.fit(x, y, epochs=25, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    trained = edited.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    assert (trained != untrained).any()
    assert_greedy_after(PROMPTS, trained, edited)
    free = PROMPTS["padding_mask"] == 0
    assert (trained[free] == LEARNED).mean() > (
        (untrained[free] == LEARNED).mean() + 0.2
    )

    # The base model shares its weights, which did not change.
    for weight, value in zip(lm.weights, before):
        np.testing.assert_array_equal(to_numpy(weight), value)


@deep_families
def test_assigning_shows_in_a_compiled_function(family):
    lm = task(family)
    edited = surgery.insert_after(lm, slice(None), dense)
    edited.compile(sampler="greedy")
    first = edited.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    function = edited.generate_function
    for site in surgery.select(edited, keras.layers.Dense):
        site.layer.kernel.assign(np.eye(32)[::-1])
    second = edited.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    assert edited.generate_function is function
    assert (first != second).any()
    assert_greedy_after(PROMPTS, second, edited)


@deep_families
def test_compiled_as_the_original(family):
    lm = task(family)
    lm.compile(
        optimizer=keras.optimizers.SGD(0.25),
        sampler="greedy",
        run_eagerly=True,
        weighted_metrics=[keras.metrics.SparseTopKCategoricalAccuracy(k=3)],
    )
    edited = surgery.remove(lm, 0)
    assert edited.sampler is lm.sampler
    assert edited.run_eagerly
    assert edited.optimizer is not lm.optimizer
    assert isinstance(edited.optimizer, keras.optimizers.SGD)
    assert float(edited.optimizer.learning_rate) == 0.25
    config, original = edited._compile_config, lm._compile_config
    assert config.config["weighted_metrics"][0].k == 3
    assert (
        config.config["weighted_metrics"]
        != (original.config["weighted_metrics"])
    )
    bare = family.task(lm.backbone, None, compile=False)
    assert not surgery.remove(bare, 0).compiled


@deep_families
def test_upstreams_lora(family, tmp_path):
    """`enable_lora()` finds its layers where an edit has put them."""
    backbone = family.backbone(num_layers=BLOCKS)
    backbone.enable_lora(2)
    edited = surgery.insert_before(surgery.remove(backbone, 0), 0, dense)
    rng = np.random.default_rng(0)
    adapters = [w for w in edited.weights if "lora" in w.name]
    assert len(adapters) == 4 * (BLOCKS - 1)
    for weight in adapters:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    expected = full_forward(edited)
    np.testing.assert_allclose(
        cached_forward(edited), expected, atol=2e-5, rtol=2e-4
    )
    edited.save_lora_weights(str(tmp_path / "x.lora.h5"))
    for weight in adapters:
        weight.assign(np.zeros(weight.shape))
    assert np.abs(full_forward(edited) - expected).max() > 1e-3
    edited.load_lora_weights(str(tmp_path / "x.lora.h5"))
    np.testing.assert_allclose(full_forward(edited), expected, atol=1e-6)
