"""Generates on 8 virtual devices, as a program for `test_distribution.py`.

python -m tests.distributed {data,model}:FAMILY[:int8]...
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np

from keras_nlp_cache.cache.policies import SinksAndWindow
from keras_nlp_cache.generate.loops.generation import slots_for
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens

HEADS = {"num_heads": 4, "num_query_heads": 8, "num_key_value_heads": 4}
LENGTHS = [5, 7, 4, 9, 6, 5, 8, 3]
# Windows that rotate where the family has them, first tokens elsewhere.
POLICIES = {
    "full": None,
    "int8": SinksAndWindow(storage="int8", sinks=4, window=20),
}


def make_lm(family, policy=None, weights=None):
    config = dict(family.config)
    heads = {name: value for name, value in HEADS.items() if name in config}
    lm = family.task(backbone=family.backbone(**heads), preprocessor=None)
    if weights is not None:
        lm.backbone.set_weights(weights)
    lm.compile(sampler="greedy", cache_policy=policy)
    return lm


def generate(lm, rows=8):
    mask = padding_mask(LENGTHS[:rows], 24)
    inputs = {"token_ids": random_tokens(8, 24)[:rows] * mask}
    inputs["padding_mask"] = mask
    return lm.generate(inputs, stop_token_ids=None)["token_ids"]


def generate_many(lm):
    """The same texts, the last of them in places of the first."""
    prompts = [
        row[:length] for row, length in zip(random_tokens(8, 24), LENGTHS)
    ]
    answers = lm.generate_many(
        [*prompts, *prompts[:3]],
        max_new_tokens=None,
        max_length=24,
        batch_size=8,
        stop_token_ids=None,
    )
    return np.stack([text for _, text in sorted(answers)])


def distribution(kind, family):
    devices = keras.distribution.list_devices()
    assert len(devices) == 8
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layout_map = family.ours("Backbone").get_layout_map(mesh)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def check_cache(cache, kind):
    """Each device holds its share, and no more."""
    for x in jax.tree.leaves(cache):
        rows, heads = (1, 4) if kind == "data" else (4, 1)
        assert len(x.addressable_shards) == 8
        for shard in x.addressable_shards:
            # What a policy keeps besides has no heads.
            share = (rows, heads) if x.ndim == 4 else (rows, x.shape[1])
            assert shard.data.shape == (*share, *x.shape[2:]), shard


def check(kind, name, policy="full"):
    print(kind, name, policy, file=sys.stderr, flush=True)
    keras.distribution.set_distribution(None)
    family = next(x for x in FAMILIES if x.name == name)
    alone = make_lm(family, POLICIES[policy])
    expected = generate(alone)
    keras.distribution.set_distribution(distribution(kind, family))
    lm = make_lm(family, POLICIES[policy], alone.backbone.get_weights())
    np.testing.assert_array_equal(generate(lm), expected)
    again = [*range(8), *range(3)]
    np.testing.assert_array_equal(generate_many(lm), expected[again])
    if name == "gpt2":
        # Fewer prompts than devices, and no even share.
        np.testing.assert_array_equal(generate(lm, 3), expected[:3])
    prompt = random_tokens(8, 5)
    loop = lm.generation_loop
    generation = loop.prefill(prompt, np.ones_like(prompt), slots_for(24, 64))
    check_cache(generation.cache, kind)
    generation = loop.decode(generation, 24)
    check_cache(generation.cache, kind)
    restored = loop.restore_cache(jax.tree.map(np.asarray, generation.cache))
    check_cache(restored, kind)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        check(*case.split(":"))
