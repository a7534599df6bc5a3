"""One of two processes of 4 virtual devices, for `test_distribution.py`.

python -m tests.distributed_process ADDRESS PROCESS FOLDER
"""

import json
import os
import pathlib
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4"
)

import jax
import keras
import numpy as np

from keras_nlp_cache import models
from keras_nlp_cache.generate.loops.generation import slots_for


def distribution(mesh_shape, backbone_cls):
    mesh = keras.distribution.DeviceMesh(mesh_shape, ("batch", "model"))
    layout_map = backbone_cls.get_layout_map(mesh)
    # The one matrix that upstream leaves whole.
    layout_map["token_embedding/reverse_embeddings"] = ("batch", "model")
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def parts(x):
    """The size of an array, and what the devices of this process hold of it.

    Of each device, where its part begins, and how many numbers it has.
    """
    return x.size, [
        ([y.start or 0 for y in shard.index], shard.data.size)
        for shard in x.addressable_shards
    ]


def run(folder, prefix, mesh, prompts, many, max_length):
    """What the devices of this process hold, and what it generates."""
    backbone_cls = getattr(models, f"{prefix}Backbone")
    keras.distribution.set_distribution(distribution(mesh, backbone_cls))
    lm = models.CausalLM.from_preset(str(folder / prefix), preprocessor=None)
    lm.compile(sampler="greedy")
    found = {"weights": {x.path: parts(x.value) for x in lm.backbone.weights}}

    given = np.arange(max_length) < np.array([[len(x)] for x in prompts])
    token_ids = np.zeros(given.shape, "int32")
    token_ids[given] = np.concatenate(prompts)
    loop, slots = lm.generation_loop, slots_for(max_length)
    row = loop.read(token_ids[0], len(prompts[0]), slots)
    found["row"] = [parts(x) for x in jax.tree.leaves(row)]
    generation = loop.prefill(token_ids, given, slots)
    found["read"] = [parts(x) for x in jax.tree.leaves(generation.cache)]
    generation = loop.decode(generation, max_length, steps=1)
    found["decoded"] = [parts(x) for x in jax.tree.leaves(generation.cache)]
    loop.release(generation)

    inputs = {"token_ids": token_ids, "padding_mask": given}
    texts = lm.generate(inputs, stop_token_ids=None)["token_ids"]
    found["texts"] = texts.tolist()
    answers = lm.generate_many(
        many,
        max_length=max_length,
        batch_size=len(prompts),
        stop_token_ids=None,
    )
    found["many"] = [text.tolist() for _, text in sorted(answers)]

    # Nobody says a seed.
    lm.compile(sampler="random")
    found["seed"] = np.asarray(lm.sampler.seed_generator.state.value).tolist()
    try:
        lm.generate(
            [[1 + jax.process_index()]],
            max_new_tokens=1,
            stop_token_ids=None,
        )
    except ValueError as e:
        found["refused"] = str(e)
    return found


def main(address, process, folder):
    keras.distribution.initialize(address, 2, int(process))
    folder = pathlib.Path(folder)
    cases = json.loads((folder / "cases.json").read_text())
    found = [run(folder, **case) for case in cases]
    (folder / f"{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
