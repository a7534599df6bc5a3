"""What a system under test can be asked to do."""

import pathlib
import re
import time

import numpy as np


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


def peak_mib():
    """Peak resident memory of the host, as Linux counts it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
