"""Compares generation with upstream's and with transformers'.

Each system runs in a process of its own. They take turns, round by round, on
the same weights and the same prompt, so that a machine that slows down slows
down all of them. The first round compiles and is not counted, and no time is
reported unless all systems generated the same tokens in it.

    python -m benchmarks speed --model gpt2 --batch 8 --prompt 128 --new 384
    python -m benchmarks rows --model smollm2 --prompts 8 --longest 350
    python -m benchmarks first-token --model smollm2
    python -m benchmarks position --model smollm2
    python -m benchmarks memory --model gpt2

Each prints a table, writes JSON to `benchmarks/results/` (or `--results`) and
draws a figure.
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

import numpy as np
import psutil
from tabulate import tabulate

from benchmarks import figures
from benchmarks import models
from benchmarks.worker import SYSTEMS
from keras_nlp_cache.files import atomic_file

RESULTS = pathlib.Path(__file__).parent / "results"
BACKENDS = ("jax", "tensorflow", "torch")
# What the integers are that a command takes.
LENGTHS = {
    "batch": "number of prompts",
    "prompt": "number of tokens of a prompt",
    "new": "number of tokens to generate",
    "max_lengths": "lengths that systems are to be ready for",
    "max_length": "the length that systems are to be ready for",
    "positions": "numbers of tokens that are there",
    "lengths": "numbers of tokens, prompt included",
    "prompts": "number of prompts",
    "shortest": "number of tokens of the shortest prompt",
    "longest": "number of tokens of the longest prompt",
    "least": "the least number of tokens to generate",
    "most": "the largest number of tokens to generate",
    "places": "number of prompts that are generated after at a time",
}
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


def measure_floors(args, cache_bytes):
    floors = {}
    for backend in args.backends:
        command = (backend, args.preset, str(args.batch), str(cache_bytes))
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.floors", *command],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        floors[backend] = json.loads(output.splitlines()[-1])
    return floors


def speed(args):
    """Tokens per second of whole calls, beside what the machine allows."""
    prompts = prompt(args.batch, args.prompt)
    rows = {}
    with workers(args) as running:
        first = {
            name: worker.ask("timed", prompt=prompts, new=args.new)
            for name, worker in running.items()
        }
        ties = check_tokens(first, running, prompts)
        for _ in range(args.rounds):
            for name, worker in running.items():
                answer = worker.ask("timed", prompt=prompts, new=args.new)
                rows.setdefault(name, []).append(answer)
    filled = args.prompt + args.new // 2
    cache = args.batch * filled * models.cache_bytes_per_slot(args.preset)
    floors = measure_floors(args, cache)
    systems = {}
    for name, answers in rows.items():
        rates = [args.batch * args.new / x["seconds"] for x in answers]
        systems[name] = {
            "tokens_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "first_call_seconds": first[name]["seconds"],
            "peak_mib": answers[-1]["peak_mib"],
        }
        floor = floors.get(name.partition("-")[2] or "torch")
        for kind, seconds in (floor or {}).items():
            systems[name][f"of_{kind}_floor"] = (
                systems[name]["tokens_per_second"] * seconds / args.batch
            )
    return {"systems": systems, "floors": floors, "ties": ties}


def rows(args):
    """Useful tokens per second after prompts of different lengths.

    Prompts have from `shortest` to `longest` tokens. What is to be generated
    after each is drawn from a geometric law between `least` and `most`.
    """
    rng = np.random.default_rng(0)
    lengths = np.linspace(args.shortest, args.longest, args.prompts).astype(int)
    prompts = [
        rng.integers(100, 10_000, x).tolist() for x in rng.permutation(lengths)
    ]
    drawn = rng.geometric(2 / (args.least + args.most), args.prompts)
    new = np.clip(drawn + args.least - 1, args.least, args.most).tolist()
    request = {"prompts": prompts, "new": new, "places": args.places}
    found = {}
    with workers(args) as running:
        first = {
            name: worker.ask("timed_rows", **request)
            for name, worker in running.items()
        }
        ties = check_tokens(first, running, prompts)
        for _ in range(args.rounds):
            for name, worker in running.items():
                answer = worker.ask("timed_rows", **request)
                found.setdefault(name, []).append(answer)
    systems = {}
    for name, answers in found.items():
        rates = [sum(new) / x["seconds"] for x in answers]
        systems[name] = {
            "tokens_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "first_call_seconds": first[name]["seconds"],
            "peak_mib": answers[-1]["peak_mib"],
        }
    return {"systems": systems, "ties": ties, "new_tokens": sum(new)}


def first_token(args):
    """Seconds from a prompt to its first token, by `max_length`."""
    prompts = prompt(1, args.prompt)
    systems = {}
    with workers(args) as running:
        for name, worker in running.items():
            answer = worker.ask("timed", prompt=prompts, new=1)
            stop = answer["tokens"][0][0]
            for max_length in args.max_lengths:
                request = {
                    "prompt": prompts,
                    "new": 1,
                    "max_length": max_length,
                    "stop": stop,
                }
                times = [
                    worker.ask("timed", **request)["seconds"]
                    for _ in range(args.rounds + 1)
                ]
                systems.setdefault(name, {})[max_length] = statistics.median(
                    times[1:]
                )
    return {"systems": systems}


def position(args):
    """Milliseconds of a decode step, by how much there is to attend to."""
    systems = {}
    with workers(args, ("ours", "transformers")) as running:
        for at in args.positions:
            for name, worker in running.items():
                request = {
                    "prompt": prompt(1, at - 1),
                    "new": 64,
                    "max_length": args.max_length,
                }
                times = [
                    worker.ask("step_milliseconds", **request)["milliseconds"]
                    for _ in range(args.rounds + 1)
                ]
                systems.setdefault(name, {})[at] = statistics.median(times[1:])
    return {"systems": systems}


def memory(args):
    """What generating adds at its peak to the weights, by size of the cache."""
    per_slot = models.cache_bytes_per_slot(args.preset)
    systems, first, sizes = {}, {}, []
    for length in args.lengths:
        sizes.append(args.batch * length * per_slot / 2**20)
        request = {
            "prompt": prompt(args.batch, args.prompt),
            "new": length - args.prompt,
        }
        # A new process each: what was freed is not always given back.
        with workers(args) as running:
            for name, worker in running.items():
                # The first call compiles.
                added = [
                    worker.ask("memory", **request)["added_mib"]
                    for _ in range(2)
                ]
                first.setdefault(name, []).append(added[0])
                systems.setdefault(name, []).append(added[1])
    return {"systems": systems, "first_call": first, "cache_mib": sizes}


def machine():
    import torch

    gib = psutil.virtual_memory().total / 2**30
    parts = [f"{os.cpu_count()} cores", platform.machine(), f"{gib:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.replacing(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=2) + "\n")


def print_table(result):
    rows = []
    for name, values in result["systems"].items():
        if isinstance(values, list):
            values = {
                f"{cache:.0f} MiB": f"{added:.0f} ({added / cache:.2f}x)"
                for cache, added in zip(result["cache_mib"], values)
            }
        rows.append({"system": name, **values})
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    for backend, floor in result.get("floors", {}).items():
        steps = {k: f"{v * 1e3:.1f} ms" for k, v in floor.items()}
        print(f"floors of a step, {backend}: {steps}")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.split("\n")[0],
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model", choices=models.MODELS, required=True, help="what generates"
    )
    shared.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=list(BACKENDS),
        help="of systems that have several",
    )
    shared.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=["ours", "keras_hub", "transformers"],
        help="what to compare",
    )
    shared.add_argument("--dtype", default="float32", help="of the weights")
    shared.add_argument(
        "--rounds", type=int, default=3, help="measurements of each system"
    )
    shared.add_argument(
        "--results",
        type=pathlib.Path,
        default=RESULTS,
        help="the folder to write JSON and figures to",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, **defaults):
        summary = function.__doc__.split("\n")[0]
        sub = commands.add_parser(
            function.__name__.replace("_", "-"),
            parents=[shared],
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        for option, default in defaults.items():
            many = isinstance(default, list)
            sub.add_argument(
                f"--{option.replace('_', '-')}",
                type=int,
                default=default,
                nargs="+" if many else None,
                help=LENGTHS[option],
            )
        sub.set_defaults(function=function)

    command(speed, batch=1, prompt=32, new=128)
    command(
        rows,
        prompts=8,
        shortest=8,
        longest=350,
        least=48,
        most=48,
        places=8,
    )
    command(first_token, prompt=32, max_lengths=[128, 256, 512, 1024])
    command(position, positions=[128, 512, 1024, 2048, 3968], max_length=4096)
    command(memory, batch=8, prompt=32, lengths=[64, 256, 512])
    args = parser.parse_args()

    function = vars(args).pop("function")
    results = vars(args).pop("results")
    with tempfile.TemporaryDirectory() as folder:
        args.preset = str(models.MODELS[args.model](folder))
        result = function(args)
    del args.preset
    result["machine"] = machine()
    result["arguments"] = vars(args)
    case = [args.command, args.model]
    if args.command == "speed":
        case += [f"batch{args.batch}", f"{args.prompt}+{args.new}"]
    if args.command == "rows":
        case += [f"{args.prompts}x{args.shortest}to{args.longest}"]
        case += [f"new{args.least}to{args.most}"]
    path = results / f"{'-'.join(case)}.json"
    write(path, result)
    print(f"{path.stem}, {args.dtype}, {result['machine']}")
    print_table(result)
    figures.draw(results)


if __name__ == "__main__":
    main()
