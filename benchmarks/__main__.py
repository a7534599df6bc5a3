"""Compares generation with upstream's, transformers' and llama.cpp's.

Each system runs in a process of its own, one for each precision. They take
turns, round by round, on the same weights and the same prompt, so that a
machine that slows down slows down all of them. The first round compiles and is
not counted, and no time is reported unless all systems generated the same
tokens in it, in float32.

    python -m benchmarks speed --model gpt2 --batch 8 --prompt 128 --new 384
    python -m benchmarks speed --model smollm2 --batch 1 8 32 --busy 1
    python -m benchmarks perplexity --model smollm2 --quantize none int8 int4
    python -m benchmarks rows --model smollm2 --prompts 8 --longest 350
    python -m benchmarks first-token --model smollm2
    python -m benchmarks position --model smollm2
    python -m benchmarks memory --model gpt2

Each prints a table, writes JSON to `benchmarks/results/` (or `--results`) and
draws a figure.
"""

import argparse
import json
import pathlib
import tempfile

from benchmarks import figures
from benchmarks import gguf_file
from benchmarks import machine
from benchmarks import measuring
from benchmarks import models
from benchmarks import tables
from benchmarks.systems import check_installed
from benchmarks.systems import QUANTIZATIONS
from benchmarks.systems import SYSTEMS
from keras_nlp_cache.files import atomic_file

RESULTS = pathlib.Path(__file__).parent / "results"
BACKENDS = ("jax", "tensorflow", "torch")
# What the integers are that a command takes.
LENGTHS = {
    "batch": "number of prompts at a time",
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


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.replacing(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=2) + "\n")


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
    shared.add_argument(
        "--dtype",
        nargs="+",
        choices=list(gguf_file.FLOATS),
        default=["float32"],
        help="of the weights, and of what is computed",
    )
    shared.add_argument(
        "--quantize",
        nargs="+",
        choices=QUANTIZATIONS,
        default=["none"],
        help="how weights are stored",
    )
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
        sub.set_defaults(function=function, busy=0)
        return sub

    timed = command(measuring.speed, batch=[1], prompt=32, new=128)
    timed.add_argument(
        "--perplexity", action="store_true", help="of each system, beside it"
    )
    several = command(
        measuring.rows,
        prompts=8,
        shortest=8,
        longest=350,
        least=48,
        most=48,
        places=8,
    )
    for sub in (timed, several):
        sub.add_argument(
            "--busy",
            type=int,
            default=0,
            help="processes that burn a core each while systems are measured",
        )
    for sub in (timed, command(measuring.perplexity)):
        sub.add_argument(
            "--text",
            type=pathlib.Path,
            help="a file, for a text other than the tests' own",
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
    check_installed(args.systems)
    described = machine.description()
    with tempfile.TemporaryDirectory() as folder:
        args.preset = str(models.MODELS[args.model](folder))
        found = function(args)
    del args.preset
    for parts, result in found.items():
        save(results, args, parts, {**result, "machine": described})
    figures.draw(results)


def save(folder, args, parts, result):
    """Writes a result, and prints it."""
    case = [args.command, args.model, *parts]
    if args.busy:
        case += [f"busy{args.busy}"]
    path = folder / f"{'-'.join(case)}.json"
    result["arguments"] = {
        name: str(x) if isinstance(x, pathlib.Path) else x
        for name, x in vars(args).items()
    }
    write(path, result)
    print(f"\n{path.stem}, {machine.in_words(result['machine'])}")
    tables.show(result)


if __name__ == "__main__":
    main()
