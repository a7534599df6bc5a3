"""Inputs in any mixture, and training with upstream's two inputs alone."""

import itertools

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from keras import ops

from tests.families import deep_families
from tests.families import divided
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import XLA

TOKENS = random_tokens(4, 8)
MASK = padding_mask([5, 8, 3, 8], 8)
INPUTS = {"token_ids": TOKENS, "padding_mask": MASK}
TARGETS = np.random.default_rng(0).normal(size=(4, 8, 32)).astype("float32")


@in_turn(
    "kind, index",
    divided(
        itertools.product(
            ["list", "numpy", "int64", "tensor"], ["int", "numpy", "tensor"]
        )
    ),
)
def test_mixtures(family, kind, index):
    backbone, _ = family.pair
    convert = {
        "list": lambda x: x.tolist(),
        "numpy": lambda x: x,
        "int64": lambda x: x.astype("int64"),
        "tensor": ops.convert_to_tensor,
    }[kind]
    scalar = {
        "int": int,
        "numpy": np.int64,
        "tensor": lambda x: ops.convert_to_tensor(x, dtype="int32"),
    }[index]
    cache = backbone.make_cache(4, 8)
    outputs = []
    for start, stop in ((0, 6), (6, 8)):
        output, cache = backbone(
            {
                "token_ids": convert(TOKENS[:, start:stop]),
                "padding_mask": MASK.astype(bool),
                "cache": cache,
                "cache_update_index": scalar(start),
                "token_positions": None,
            }
        )
        outputs.append(to_numpy(output))
    np.testing.assert_allclose(
        np.concatenate(outputs, axis=1),
        to_numpy(family.pair[1](INPUTS)),
        atol=1e-5,
        rtol=1e-5,
    )


@deep_families
def test_optional_keys_may_be_missing_or_none(family):
    backbone, upstream = family.pair
    expected = to_numpy(upstream(INPUTS))
    optional = ("cache", "cache_update_index", "token_positions")
    for names in itertools.chain.from_iterable(
        itertools.combinations(optional, n) for n in range(4)
    ):
        output = backbone({**INPUTS, **dict.fromkeys(names)})
        np.testing.assert_array_equal(to_numpy(output), expected)


@deep_families
def test_cache_of_numpy_arrays(family):
    backbone, _ = family.pair
    cache = backbone.make_cache(4, 8)
    arrays = [[ops.convert_to_numpy(x) for x in pair] for pair in cache]
    inputs = {"token_ids": TOKENS, "cache_update_index": 0}
    np.testing.assert_array_equal(
        to_numpy(backbone({**inputs, "cache": arrays})[0]),
        to_numpy(backbone({**inputs, "cache": cache})[0]),
    )


def dataset(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(2)


@deep_families
def test_training_a_backbone(family):
    histories = []
    ours = family.backbone()
    for backbone in (ours, family.upstream_backbone(ours)):
        backbone.compile(
            optimizer=keras.optimizers.SGD(0.01), loss="mse", **XLA
        )
        history = [
            backbone.fit(
                INPUTS,
                TARGETS,
                batch_size=2,
                shuffle=False,
                epochs=2,
                verbose=0,
            ).history["loss"],
            backbone.fit(dataset(INPUTS, TARGETS), verbose=0).history["loss"],
            backbone.evaluate(INPUTS, TARGETS, verbose=0),
            backbone.train_on_batch(INPUTS, TARGETS),
            backbone.test_on_batch(INPUTS, TARGETS),
            backbone.predict(INPUTS, verbose=0),
            backbone.predict_on_batch(INPUTS),
        ]
        histories.append(np.concatenate([np.ravel(x) for x in history]))
    np.testing.assert_allclose(*histories, rtol=1e-5, atol=1e-5)


@deep_families
def test_training_a_task(family):
    losses = []
    ours = family.backbone()
    labels = np.roll(TOKENS, -1, axis=1)
    for backbone, task in (
        (ours, family.ours("CausalLM")),
        (family.upstream_backbone(ours), family.upstream("CausalLM")),
    ):
        lm = task(backbone, None)
        lm.compile(
            optimizer=keras.optimizers.SGD(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **XLA,
        )
        history = lm.fit(
            INPUTS,
            labels,
            sample_weight=MASK.astype("float32"),
            shuffle=False,
            epochs=3,
            verbose=0,
        )
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


class PooledTextClassifier(keras_hub.models.TextClassifier):
    """A task head as keras_hub writes them, for families that have none."""

    def __init__(self, backbone, num_classes, preprocessor=None, **kwargs):
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.pooler = keras.layers.GlobalAveragePooling1D(name="pooler")
        self.dense = keras.layers.Dense(num_classes, name="logits")
        inputs = backbone.input
        outputs = self.dense(self.pooler(backbone(inputs)))
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.num_classes = num_classes


@deep_families
def test_upstream_task_heads(family):
    """A text classifier on one of our backbones learns as on upstream's."""
    losses = []
    ours = family.backbone()
    for backbone in (ours, family.upstream_backbone(ours)):
        keras.utils.set_random_seed(1)
        classifier = PooledTextClassifier(backbone, num_classes=2)
        classifier.compile(
            optimizer=keras.optimizers.SGD(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **XLA,
        )
        history = classifier.fit(
            dataset(INPUTS, np.array([0, 1, 0, 1])), epochs=2, verbose=0
        )
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_training_a_task_on_text():
    """Strings and a preprocessor, alone and in a `tf.data.Dataset`."""
    family = FAMILIES[0]
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    ours = family.backbone(vocabulary_size=size)
    upstream = family.upstream_backbone(ours, vocabulary_size=size)
    sentences = ["the quick brown fox", "what is the capital of france"]
    losses = []
    for backbone, task in (
        (ours, family.ours("CausalLM")),
        (upstream, family.upstream("CausalLM")),
    ):
        lm = task(backbone, preprocessor)
        lm.compile(
            optimizer=keras.optimizers.SGD(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **XLA,
        )
        batches = tf.data.Dataset.from_tensor_slices(sentences).batch(2)
        losses.append(
            [
                *lm.fit(sentences, shuffle=False, verbose=0).history["loss"],
                *lm.fit(batches, verbose=0).history["loss"],
                lm.evaluate(sentences, verbose=0, return_dict=True)["loss"],
            ]
        )
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_lengths_may_vary():
    """Lengths are not baked into what `predict` compiles."""
    backbone, upstream = FAMILIES[0].pair
    for length in (3, 5):
        inputs = {name: x[:, :length] for name, x in INPUTS.items()}
        np.testing.assert_allclose(
            backbone.predict(inputs, verbose=0),
            upstream.predict(inputs, verbose=0),
            atol=1e-6,
        )
