"""What is measured: one function per command."""

import json
import statistics
import subprocess
import sys

import numpy as np

from benchmarks import models
from benchmarks.running import check_tokens
from benchmarks.running import prompt
from benchmarks.running import workers


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
