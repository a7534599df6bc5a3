"""Compares `generate()` with upstream's and with transformers'.

Each system runs in a process of its own. They take turns, round by round, on
the same weights and the same prompt, so that a machine that slows down slows
down all of them. The first round compiles and is not counted. Unless all
systems generate the same tokens, no time is reported.

    python -m benchmarks --backend jax --model smollm2
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

from benchmarks.worker import SYSTEMS

RESULTS = pathlib.Path(__file__).parent / "results"


def gpt2(folder):
    """GPT-2 base with random weights, as a Hugging Face directory."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.save_pretrained(folder)
    return folder


def smollm2(folder):
    """SmolLM2-135M-Instruct, with its own weights."""
    from keras_nlp_cache import default_model

    return default_model.preset()


MODELS = {f.__name__: f for f in (gpt2, smollm2)}


class Worker:
    """A benchmarks.worker process that generates on request."""

    def __init__(self, system, preset, args):
        sizes = [
            f"--{x}={getattr(args, x)}" for x in ("batch", "prompt", "new")
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", system, preset, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "KERAS_BACKEND": args.backend,
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
        )

    def generate(self):
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A worker died; what it said is above.")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def measure(preset, args):
    """Returns the rows of each system, the first of them not to be counted."""
    rows = {system: [] for system in args.systems}
    with contextlib.ExitStack() as stack:
        workers = {
            system: stack.enter_context(Worker(system, preset, args))
            for system in args.systems
        }
        for _ in range(args.rounds + 1):
            for system, worker in workers.items():
                rows[system].append(worker.generate())
    return rows


def summarize(rows, args):
    """Medians and spread of each system, in tokens per second."""
    tokens = [row["tokens"] for results in rows.values() for row in results]
    if any(x != tokens[0] for x in tokens):
        raise SystemExit("The systems generated different tokens: no result.")
    summary = {}
    for system, (first, *counted) in rows.items():
        rates = [args.batch * args.new / row["seconds"] for row in counted]
        summary[system] = {
            "tokens_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "first_call_seconds": first["seconds"],
            "peak_mib": counted[-1]["peak_mib"],
        }
    return summary


def write(path, result):
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False
    ) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backend", required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(systems=list(SYSTEMS))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        summary = summarize(measure(MODELS[args.model](folder), args), args)
    case = (
        f"{args.model}-{args.backend}-batch{args.batch}"
        f"-{args.prompt}+{args.new}"
    )
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{case}, float32, {machine}, median of {args.rounds}")
    for system, row in summary.items():
        print(
            f"{system:<14}{row['tokens_per_second']:8.1f} tokens/s  "
            f"({row['slowest']:.1f} to {row['fastest']:.1f})  "
            f"first call {row['first_call_seconds']:6.1f} s  "
            f"peak {row['peak_mib']:6.0f} MiB"
        )
    write(
        RESULTS / f"{case}.json",
        {"machine": machine, "arguments": vars(args), "systems": summary},
    )


if __name__ == "__main__":
    main()
