"""One system under test, in a process of its own.

Loads a model, then for every line on standard input generates once and writes
a line of JSON: how long it took, and the tokens.
"""

import argparse
import json
import resource
import sys
import time

import numpy as np


def keras_system(models, args):
    lm = models.CausalLM.from_preset(args.preset, preprocessor=None)
    lm.compile(sampler="greedy")

    def generate(prompt):
        batch, length = prompt.shape
        total = length + args.new
        inputs = {
            "token_ids": np.pad(prompt, ((0, 0), (0, args.new))),
            "padding_mask": np.tile(np.arange(total) < length, (batch, 1)),
        }
        output = lm.generate(inputs, stop_token_ids=None)
        return output["token_ids"][:, length:]

    return generate


def ours(args):
    from keras_nlp_cache import models

    return keras_system(models, args)


def keras_hub(args):
    from keras_hub import models

    return keras_system(models, args)


def transformers(args):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.preset, dtype=torch.float32
    ).eval()

    def generate(prompt):
        prompt = torch.tensor(prompt.astype("int64"))
        with torch.no_grad():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=args.new,
                max_new_tokens=args.new,
                pad_token_id=0,
                eos_token_id=None,
            )
        return output[:, prompt.shape[1] :].numpy()

    return generate


SYSTEMS = {f.__name__: f for f in (ours, keras_hub, transformers)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("preset")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    args = parser.parse_args()

    results = sys.stdout
    sys.stdout = sys.stderr  # Whatever libraries print is no result.
    generate = SYSTEMS[args.system](args)
    rng = np.random.default_rng(0)
    prompt = rng.integers(100, 10_000, (args.batch, args.prompt))
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = np.asarray(generate(prompt.astype("int32")))
        row = {
            "seconds": time.perf_counter() - start,
            "tokens": tokens.tolist(),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / 1024,
        }
        print(json.dumps(row), file=results, flush=True)


if __name__ == "__main__":
    main()
