"""What upstream's classes generate, in a file, to compare releases by.

    python -m tests.reference tokens.npz

Weights and prompts are the same in every process, so the tokens are too, unless
keras_hub changed. `patches/check.py` runs it with and without the patches.
"""

import argparse

import keras_hub
import numpy as np

from tests.families import DEEP
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import randomize

SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler,
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=5, seed=7),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3),
}


def reference():
    """Dictionary from names of families and samplers to generated tokens."""
    mask = padding_mask([4, 9, 6], 16)
    prompts = {"token_ids": random_tokens(3, 16) * mask, "padding_mask": mask}
    tokens = {}
    for family in DEEP:
        backbone = family.upstream("Backbone")(**dict(family.config))
        randomize(backbone)
        lm = family.upstream_task(backbone, None)
        for name, sampler in SAMPLERS.items():
            lm.compile(sampler=sampler())
            output = lm.generate(prompts, stop_token_ids=None)
            tokens[f"{family.name} {name}"] = output["token_ids"]
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="the .npz file to write")
    np.savez(parser.parse_args().path, **reference())


if __name__ == "__main__":
    main()
