"""What a system under test can be asked to do."""

import pathlib
import re
import time

import numpy as np

from benchmarks import kinds


class System:
    """What a system under test can be asked to do.

    Subclasses load a model and define `generate()`, `batch()`, `logits()` and
    `weight_bytes()`.

    Args:
        preset: str. Path of a Hugging Face directory.
        dtype: str. Of the weights, and of what is computed.
        quantize: str, one of `quantizations`. How weights are stored, `"none"`
            for as they are.
    """

    quantizations = ("none",)
    # What prompts are, one of `benchmarks.kinds`.
    kind = kinds.Text()
    # Tokens whose logits are closer than this are a tie that rounding decides.
    tie = 1e-3
    # Kinds of models that it generates otherwise with than their graph says.
    generates_otherwise = ()

    def generate(self, prompt, new, max_length=None, stop=None):
        """Greedy tokens `(B, new)` after a prompt, as an array.

        Args:
            prompt: Dictionary of arrays, from `kind.read()`.
            new: int. How many tokens to generate, unless `stop` comes first.
            max_length: int. The length that the system is to be ready for.
            stop: int. A token to stop after.
        """
        raise NotImplementedError

    def timed(self, prompt, **kwargs):
        prompt = self.kind.read(prompt)
        start = time.perf_counter()
        tokens = self.generate(prompt, **kwargs)
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

    def logits(self, prompt, after):
        """Logits `(T, vocabulary_size)` after each token of one row.

        Args:
            prompt: Dictionary of arrays of one row, from `kind.read()`.
            after: int32 array `(1, T)`, what comes after the prompt. It may be
                empty.
        """
        raise NotImplementedError

    def weight_bytes(self):
        """What those weights take that a step reads, once each."""
        raise NotImplementedError

    def perplexity(self, tokens):
        """How surprised a model is by a text, its first token aside."""
        prompt = self.kind.read({"token_ids": [tokens]})
        logits = self.logits(prompt, np.zeros((1, 0), "int32"))
        logits = logits[:-1].astype("float64")
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), tokens[1:]]
        losses = np.log(np.exp(logits).sum(axis=1)) - chosen
        return {
            "perplexity": float(np.exp(losses.mean())),
            "nats_per_token": float(losses.mean()),
        }

    def logit_gap(self, prompt, after, candidates):
        """How far apart two candidates for the token after others are."""
        after = np.asarray([after], "int32")
        logits = self.logits(self.kind.read(prompt), after)
        logits = logits[-1, candidates].astype("float64")
        return {"gap": float(abs(logits[0] - logits[1]))}

    def step_milliseconds(self, prompt, new, max_length):
        """The mean duration of a decode step after a prompt."""
        prompt = self.kind.read(prompt)
        start = time.perf_counter()
        self.generate(prompt, 1, max_length)
        middle = time.perf_counter()
        self.generate(prompt, 1 + new, max_length)
        seconds = time.perf_counter() - middle - (middle - start)
        return {"milliseconds": seconds / new * 1e3}

    def timed_rows(self, prompt, **kwargs):
        start = time.perf_counter()
        tokens = self.rows(prompt["token_ids"], **kwargs)
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


def itemsize(dtype):
    """Bytes of a number, by the name of its type."""
    bits = re.search(r"\d+$", dtype)
    return int(bits[0]) // 8 if bits else 1


def peak_mib():
    """Peak resident memory of the host, as Linux counts it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
