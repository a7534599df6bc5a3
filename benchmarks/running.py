"""Systems under test as processes, and what they are asked to agree on."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np

from benchmarks.systems import SYSTEMS

# Tokens whose logits are closer than this are a tie that rounding decides.
TIE = 1e-3


class Worker:
    """A system under test, as a process of `benchmarks.worker`."""

    def __init__(self, name, preset, dtype):
        system, _, backend = name.partition("-")
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if backend:
            environment["KERAS_BACKEND"] = backend
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", system, preset, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, method, **kwargs):
        request = json.dumps({"method": method, **kwargs})
        print(request, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died; what it said is above.")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(args, systems=SYSTEMS):
    """One worker per system, and per backend where it has several."""
    names = []
    for system in args.systems:
        if system not in systems:
            continue
        if system in ("ours", "in_batches", "keras_hub"):
            names += [f"{system}-{backend}" for backend in args.backends]
        else:
            names.append(system)
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(Worker(name, args.preset, args.dtype))
            for name in names
        }


def prompt(batch, length):
    rng = np.random.default_rng(0)
    return rng.integers(100, 10_000, (batch, length)).tolist()


def check_tokens(answers, running, prompts):
    """Ends the program unless all generated the same, ties aside."""
    (reference, first), *others = answers.items()
    judge = next(w for name, w in running.items() if name.startswith("ours"))
    ties = 0
    for name, answer in others:
        rows = zip(prompts, first["tokens"], answer["tokens"])
        for row, (start, expected, actual) in enumerate(rows):
            if expected == actual:
                continue
            at = next(i for i, x in enumerate(expected) if x != actual[i])
            gap = judge.ask(
                "logit_gap",
                tokens=start + expected[:at],
                candidates=[expected[at], actual[at]],
            )["gap"]
            if gap > TIE:
                raise SystemExit(
                    f"No result: {reference} and {name} differ in row {row}, "
                    f"token {at}, where logits are {gap:.2g} apart."
                )
            ties += 1
    return ties
