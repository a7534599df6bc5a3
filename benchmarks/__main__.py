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
import json
import os
import pathlib
import platform
import tempfile

import psutil
from tabulate import tabulate

from benchmarks import figures
from benchmarks import measuring
from benchmarks import models
from benchmarks.systems import SYSTEMS
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

    command(measuring.speed, batch=1, prompt=32, new=128)
    command(
        measuring.rows,
        prompts=8,
        shortest=8,
        longest=350,
        least=48,
        most=48,
        places=8,
    )
    command(measuring.first_token, prompt=32, max_lengths=[128, 256, 512, 1024])
    command(
        measuring.position,
        positions=[128, 512, 1024, 2048, 3968],
        max_length=4096,
    )
    command(measuring.memory, batch=8, prompt=32, lengths=[64, 256, 512])
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
