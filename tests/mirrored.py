"""Generates in the scope of a strategy, as a program for `test_strategies.py`.

python -m tests.mirrored FAMILY
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from keras_nlp_cache.generate.loops.tensorflow_loop import TensorFlowLoop
from tests.families import FAMILIES
from tests.families import padding_mask

LENGTH = 12


def make_strategy():
    """A strategy over two logical devices, which are settled for good."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    return strategy


def said(lm, draft):
    """All that a model says, in every way in which it can say it."""
    keras.utils.set_random_seed(0)
    lm.compile(sampler="greedy")
    draft.compile(sampler="greedy")
    kwargs = dict(max_length=LENGTH, stop_token_ids=None)
    texts = lm.generate(["the fox", "a quick dog"], **kwargs)
    yield from texts
    yield from lm.stream("the fox", 4, None)
    session = lm.start_session()
    yield session.send("the fox", 4, None)
    yield session.fork().send("dog", 4, None)
    session.rewind(2)
    yield session.send("a", 4, None)
    yield lm.generate("the fox", assistant_model=draft, **kwargs)
    mask = padding_mask([5, 3], LENGTH)
    preprocessor, lm.preprocessor = lm.preprocessor, None
    inputs = {"token_ids": mask * 7, "padding_mask": mask}
    tokens = lm.generate(inputs, stop_token_ids=None)["token_ids"]
    lm.preprocessor = preprocessor
    yield np.array(tokens).tolist()
    for sampler in ("beam", "top_k"):
        keras.utils.set_random_seed(1)
        lm.compile(sampler=sampler)
        yield [lm.generate("the fox", **kwargs) for _ in range(2)]
    lm.compile(sampler="greedy", run_eagerly=True)
    yield lm.generate("the fox", **kwargs)


def sampled(lm, **options):
    """Twice, as the seed advances."""
    lm.compile(**options)
    first, second = (
        lm.generate("the fox", max_length=LENGTH, stop_token_ids=None)
        for _ in range(2)
    )
    assert first != second, first
    return first, second


def random_sampler():
    return keras_hub.samplers.RandomSampler(temperature=5.0, seed=3)


def check(family, strategy):
    outside, draft = family.text_lm(), family.text_lm()
    draft.backbone.set_weights([x * 1.1 for x in draft.backbone.get_weights()])
    expected = list(said(outside, draft))
    with strategy.scope():
        inside = family.text_lm()
        inside.backbone.set_weights(outside.backbone.get_weights())
        session = outside.start_session()
        begun = session.send("the fox", 4, None)
        for lm in (outside, inside):
            assert list(said(lm, draft)) == expected
    assert list(said(inside, draft)) == expected
    outside.compile(sampler="greedy")
    whole = outside.start_session()
    assert whole.send("the fox", 4, None) == begun
    assert whole.send("dog", 4, None) == session.send("dog", 4, None)
    with strategy.scope():
        on_both_devices = sampled(inside, sampler=random_sampler())
    assert on_both_devices == sampled(outside, sampler=random_sampler())


def check_xla(family, strategy):
    """Which cannot write to a seed on another device."""
    lm = family.text_lm()
    options = dict(jit_compile=True)
    expected = sampled(lm, sampler=random_sampler(), **options)
    sampler = random_sampler()
    with strategy.scope():
        assert sampled(lm, sampler=sampler, **options) == expected
        sampled(lm, sampler=random_sampler(), **options)
        # What is compiled by name has its seeds where the cache is.
        lm.compile(sampler="random", **options)
        assert all(
            not isinstance(x.value, tf.distribute.DistributedValues)
            for x in lm.sampler.variables
        )


if __name__ == "__main__":
    strategy = make_strategy()
    TensorFlowLoop.jit_compile_by_default = False
    family = next(x for x in FAMILIES if x.name == sys.argv[1])
    check(family, strategy)
    check_xla(family, strategy)
