"""One system under test, in a process of its own.

Loads a model, then answers every line of JSON on standard input with one on
standard output. A request names a method of `System` and its arguments.
"""

import argparse
import json
import pathlib
import re
import sys
import time

import numpy as np
import psutil


class System:
    """What a system under test can be asked to do.

    Subclasses load a model and define `generate()`.
    """

    def generate(self, prompt, new, max_length=None, stop=None):
        """Greedy tokens `(B, new)` after a prompt `(B, P)`, as an array.

        Args:
            prompt: int32 array.
            new: int. How many tokens to generate, unless `stop` comes first.
            max_length: int. The length that the system is to be ready for.
            stop: int. A token to stop after.
        """
        raise NotImplementedError

    def timed(self, prompt, **kwargs):
        start = time.perf_counter()
        tokens = self.generate(np.asarray(prompt, "int32"), **kwargs)
        return {
            "seconds": time.perf_counter() - start,
            "tokens": np.asarray(tokens).tolist(),
            "peak_mib": peak_mib(),
        }

    def rows(self, prompts, new, places):
        """Greedy tokens after prompts of any length, some at a time.

        Here, a batch of prompts after the other, each until all of its texts
        are as long as they are to be.

        Args:
            prompts: List of lists of token ids.
            new: List of ints. How many tokens to generate after each.
            places: int. How many prompts to generate after at a time.

        Returns:
            A list with a list of tokens for each.
        """
        tokens = []
        for at in range(0, len(prompts), places):
            batch = slice(at, at + places)
            tokens += self.batch(prompts[batch], new[batch])
        return tokens

    def batch(self, prompts, new):
        """Greedy tokens after a batch of prompts of any length."""
        raise NotImplementedError

    def timed_rows(self, **kwargs):
        start = time.perf_counter()
        tokens = self.rows(**kwargs)
        return {
            "seconds": time.perf_counter() - start,
            "tokens": [[int(x) for x in row] for row in tokens],
            "peak_mib": peak_mib(),
        }

    def memory(self, prompt, **kwargs):
        """How much a generation adds at its peak to what was loaded."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # The peak starts anew.
        answer = self.timed(prompt, **kwargs)
        return {"added_mib": answer["peak_mib"] - self.loaded_mib}


class KerasSystem(System):
    """A `CausalLM` of Keras, on the backend of `KERAS_BACKEND`."""

    def __init__(self, models, preset, dtype):
        self.lm = models.CausalLM.from_preset(
            preset, preprocessor=None, dtype=dtype
        )
        self.lm.compile(sampler="greedy")

    def generate(self, prompt, new, max_length=None, stop=None):
        batch, length = prompt.shape
        total = max_length or length + new
        inputs = {
            "token_ids": np.pad(prompt, ((0, 0), (0, total - length))),
            "padding_mask": np.tile(np.arange(total) < length, (batch, 1)),
        }
        output = self.lm.generate(
            inputs, stop_token_ids=None if stop is None else (stop,)
        )
        return output["token_ids"][:, length : length + new]

    def batch(self, prompts, new):
        lengths = np.array([len(x) for x in prompts])
        total = int((lengths + new).max())
        mask = np.arange(total) < lengths[:, None]
        token_ids = np.zeros(mask.shape, "int32")
        token_ids[mask] = np.concatenate(prompts)
        output = self.lm.generate(
            {"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None
        )["token_ids"]
        return [
            row[length : length + count]
            for row, length, count in zip(output, lengths, new)
        ]

    def logit_gap(self, tokens, candidates):
        """How far apart two candidates for the next token are."""
        tokens = np.asarray(tokens, "int32")[None]
        logits = self.lm({"token_ids": tokens, "padding_mask": tokens * 0 + 1})
        logits = np.array(logits[0, -1], "float64")[candidates]
        return {"gap": float(abs(logits[0] - logits[1]))}


class Ours(KerasSystem):
    """keras_nlp_cache."""

    def __init__(self, preset, dtype):
        from keras_nlp_cache import models

        super().__init__(models, preset, dtype)

    def rows(self, prompts, new, places):
        requests = [
            {"prompt": prompt, "max_new_tokens": count}
            for prompt, count in zip(prompts, new)
        ]
        return self.lm.generate(
            requests, batch_size=places, stop_token_ids=None, strip_prompt=True
        )

    def step_milliseconds(self, prompt, new, max_length):
        """The mean duration of a decode step after a prompt."""
        prompt = np.asarray(prompt, "int32")
        loop = self.lm.generation_loop
        generation = loop.prefill(prompt, np.ones_like(prompt), max_length)
        length = prompt.shape[1]
        generation = loop.decode(generation, length + 1)
        np.asarray(generation.token_ids)
        start = time.perf_counter()
        generation = loop.decode(generation, length + 1 + new)
        np.asarray(generation.token_ids)  # JAX does not wait otherwise.
        return {"milliseconds": (time.perf_counter() - start) / new * 1e3}


class InBatches(Ours):
    """keras_nlp_cache, a batch of prompts after the other."""

    def rows(self, prompts, new, places):
        return System.rows(self, prompts, new, places)

    def batch(self, prompts, new):
        return super().rows(prompts, new, places=len(prompts))


class KerasHub(KerasSystem):
    """keras_hub."""

    def __init__(self, preset, dtype):
        from keras_hub import models

        super().__init__(models, preset, dtype)


class Transformers(System):
    """transformers on PyTorch, eager, with its default cache."""

    options = {}

    def __init__(self, preset, dtype):
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            preset, dtype=getattr(torch, dtype)
        )
        self.model = model.to(torch_device()).eval()

    def generate(self, prompt, new, max_length=None, stop=None):
        import torch

        prompt = torch.tensor(prompt.astype("int64"), device=torch_device())
        with torch.no_grad():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=None if stop is not None else new,
                max_new_tokens=new,
                pad_token_id=0,
                eos_token_id=stop,
                **self.options,
            )
        return output[:, prompt.shape[1] :].numpy(force=True)

    def batch(self, prompts, new):
        import torch

        lengths = np.array([len(x) for x in prompts])
        most = lengths.max()
        mask = np.arange(most) >= most - lengths[:, None]
        token_ids = np.zeros(mask.shape, "int64")
        token_ids[mask] = np.concatenate(prompts)
        with torch.no_grad():
            output = self.model.generate(
                torch.tensor(token_ids, device=torch_device()),
                attention_mask=torch.tensor(
                    mask.astype("int64"), device=torch_device()
                ),
                do_sample=False,
                min_new_tokens=max(new),
                max_new_tokens=max(new),
                pad_token_id=0,
                eos_token_id=None,
                **self.options,
            ).numpy(force=True)
        return [row[most : most + n] for row, n in zip(output, new)]

    def step_milliseconds(self, prompt, new, max_length):
        prompt = np.asarray(prompt, "int32")
        start = time.perf_counter()
        self.generate(prompt, 1)
        middle = time.perf_counter()
        self.generate(prompt, 1 + new)
        seconds = time.perf_counter() - middle - (middle - start)
        return {"milliseconds": seconds / new * 1e3}


class TransformersCompiled(Transformers):
    """transformers with a static cache and a forward pass that is compiled."""

    options = {"cache_implementation": "static"}

    def __init__(self, preset, dtype):
        import torch

        super().__init__(preset, dtype)
        self.model.forward = torch.compile(self.model.forward)


SYSTEMS = {
    "ours": Ours,
    "in_batches": InBatches,
    "keras_hub": KerasHub,
    "transformers": Transformers,
    "transformers_compiled": TransformersCompiled,
}


def torch_device():
    """Where Keras puts tensors of PyTorch: on a GPU, if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_mib():
    """Peak resident memory of the host, as Linux counts it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("preset")
    parser.add_argument("dtype")
    args = parser.parse_args()

    results = sys.stdout
    sys.stdout = sys.stderr  # Whatever libraries print is no result.
    system = SYSTEMS[args.system](args.preset, args.dtype)
    system.loaded_mib = psutil.Process().memory_info().rss / 2**20
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(system, request.pop("method"))(**request)
        print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    main()
