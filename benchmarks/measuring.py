"""What is measured: one function per command.

Each returns results by the parts of a file's name that say which case it is.
"""

import json
import statistics
import subprocess
import sys

import numpy as np

from benchmarks import busy
from benchmarks import kinds
from benchmarks import machine
from benchmarks import models
from benchmarks import perplexities
from benchmarks.running import check_tokens
from benchmarks.running import EXACT
from benchmarks.running import planned
from benchmarks.running import workers


def measure_floors(args, batch):
    """Seconds that a step takes at least, by backend."""
    floors = {}
    for backend in args.backends:
        command = (backend, args.preset, str(batch))
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.floors", *command],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        floors[backend] = json.loads(output.splitlines()[-1])
    return floors


def in_turns(args, running, method, prompt, **request):
    """The answers of all workers, round by round, after one that compiles.

    Returns:
        The first answer of each, a list of the others for each, and what
        `check_tokens()` found.
    """
    request["prompt"] = prompt
    first = {
        name: worker.ask(method, **request) for name, worker in running.items()
    }
    agreement = check_tokens(first, running, prompt)
    rounds = {name: [] for name in running}
    with busy.neighbors(args.busy):
        for _ in range(args.rounds):
            for name, worker in running.items():
                rounds[name].append(worker.ask(method, **request))
    return first, rounds, agreement


def rates(first, answers, tokens):
    """What a system did in rounds of a number of tokens each."""
    per_second = [tokens / x["seconds"] for x in answers]
    return {
        "tokens_per_second": statistics.median(per_second),
        "slowest": min(per_second),
        "fastest": max(per_second),
        "first_call_seconds": first["seconds"],
        "peak_mib": answers[-1]["peak_mib"],
    }


def speed(args):
    """Tokens per second of whole calls, beside what the machine allows."""
    results = {}
    kind = kinds.of(args.preset)
    if args.perplexity:
        tokens = perplexities.token_ids(args.preset, args.text)
    with workers(args) as running:
        weights = {
            name: worker.ask("weight_bytes")["bytes"]
            for name, worker in running.items()
        }
        for batch in args.batch:
            prompt = kind.prompt(batch, args.prompt)
            first, rounds, agreement = in_turns(
                args, running, "timed", prompt, new=args.new
            )
            systems = {
                name: {
                    "precision": str(running[name].precision),
                    **rates(first[name], answers, batch * args.new),
                }
                for name, answers in rounds.items()
            }
            results[batch] = {"systems": systems, **agreement}
        if args.perplexity:
            for name, worker in running.items():
                found = worker.ask("perplexity", tokens=tokens)
                for result in results.values():
                    row = result["systems"][name]
                    row["perplexity"] = found["perplexity"]
        precisions = {name: x.precision for name, x in running.items()}
        backends = {name: x.backend for name, x in running.items()}
    bandwidth = machine.description()["bytes_per_second"]
    for batch, result in results.items():
        floors = result["floors"] = measure_floors(args, batch)
        for name, row in result["systems"].items():
            step = row["tokens_per_second"] / batch
            slot = models.cache_bytes_per_slot(
                args.preset, precisions[name].dtype
            )
            half_way = kind.slots(args.prompt) + args.new // 2
            filled = batch * half_way * slot
            row["bytes_per_token"] = (weights[name] + filled) / batch
            row["of_bandwidth_floor"] = (
                step * (weights[name] + filled) / bandwidth
            )
            if precisions[name] == EXACT and backends[name] in floors:
                floor = floors[backends[name]]["products"]
                row["of_products_floor"] = step * floor
    return {
        (f"batch{batch}", f"{args.prompt}+{args.new}"): result
        for batch, result in results.items()
    }


def perplexity(args):
    """Perplexity of a text in each precision."""
    tokens = perplexities.token_ids(args.preset, args.text)
    found = {}
    for start in planned(args):
        # Nothing is timed, so one after the other, which takes less memory.
        with start() as worker:
            answer = worker.ask("perplexity", tokens=tokens)
            found[worker.name] = {"precision": str(worker.precision), **answer}
    systems = perplexities.compared(found)
    return {(): {"systems": systems, "tokens": len(tokens)}}


def rows(args):
    """Useful tokens per second after prompts of different lengths.

    Prompts have from `shortest` to `longest` tokens. What is to be generated
    after each is drawn from a geometric law between `least` and `most`.
    """
    kinds.check_text(args.preset, "rows")
    rng = np.random.default_rng(0)
    lengths = np.linspace(args.shortest, args.longest, args.prompts).astype(int)
    prompts = [
        rng.integers(100, 10_000, x).tolist() for x in rng.permutation(lengths)
    ]
    drawn = rng.geometric(2 / (args.least + args.most), args.prompts)
    new = np.clip(drawn + args.least - 1, args.least, args.most).tolist()
    with workers(args) as running:
        first, rounds, agreement = in_turns(
            args,
            running,
            "timed_rows",
            {"token_ids": prompts},
            new=new,
            places=args.places,
        )
        systems = {
            name: {
                "precision": str(running[name].precision),
                **rates(first[name], answers, sum(new)),
            }
            for name, answers in rounds.items()
        }
    case = (
        f"{args.prompts}x{args.shortest}to{args.longest}",
        f"new{args.least}to{args.most}",
    )
    return {case: {"systems": systems, **agreement, "new_tokens": sum(new)}}


def first_token(args):
    """Seconds from a prompt to its first token, by `max_length`."""
    prompt = kinds.of(args.preset).prompt(1, args.prompt)
    systems = {}
    with workers(args) as running:
        for name, worker in running.items():
            answer = worker.ask("timed", prompt=prompt, new=1)
            stop = answer["tokens"][0][0]
            for max_length in args.max_lengths:
                request = {
                    "prompt": prompt,
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
    return {(): {"systems": systems}}


def position(args):
    """Milliseconds of a decode step, by how much there is to attend to."""
    kinds.check_text(args.preset, "position")
    kind = kinds.of(args.preset)
    systems = {}
    with workers(args, ("ours", "transformers", "llama_cpp")) as running:
        for at in args.positions:
            for name, worker in running.items():
                request = {
                    "prompt": kind.prompt(1, at - 1),
                    "new": 64,
                    "max_length": args.max_length,
                }
                times = [
                    worker.ask("step_milliseconds", **request)["milliseconds"]
                    for _ in range(args.rounds + 1)
                ]
                systems.setdefault(name, {})[at] = statistics.median(times[1:])
    return {(): {"systems": systems}}


def memory(args):
    """What generating adds at its peak to the weights, by size of the cache."""
    if len(args.dtype) > 1:
        raise SystemExit(
            "Expected one --dtype, since that decides the size of the cache. "
            f"Received: {args.dtype}."
        )
    kind = kinds.of(args.preset)
    per_slot = models.cache_bytes_per_slot(args.preset, args.dtype[0])
    systems, first, sizes = {}, {}, []
    for length in args.lengths:
        new = length - args.prompt
        slots = kind.slots(args.prompt) + new
        sizes.append(args.batch * slots * per_slot / 2**20)
        request = {
            "prompt": kind.prompt(args.batch, args.prompt),
            "new": new,
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
    return {(): {"systems": systems, "first_call": first, "cache_mib": sizes}}
