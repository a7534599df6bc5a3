"""The arguments of commands that run a model, and the model that they mean."""

import argparse

from keras_nlp_cache import garbage
from keras_nlp_cache.command_line import few_imports

SAMPLERS = {
    "greedy": "GreedySampler",
    "top_k": "TopKSampler",
    "top_p": "TopPSampler",
    "random": "RandomSampler",
}


class CommandError(Exception):
    """A mistake to be explained in one line, without a traceback."""


def model_arguments(max_new_tokens):
    """A parser of the arguments that say which model, and how it answers."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--preset",
        help="a keras_hub preset or hub handle, or the path of a local preset "
        "or Hugging Face directory, or of a GGUF file (default: "
        "SmolLM2-135M-Instruct)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--keep-quantized",
        action="store_true",
        help="leave the matrices of a GGUF file as small as they are stored, "
        "those in Q8_0, Q4_0 and Q4_1",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive(int),
        default=max_new_tokens,
        metavar="N",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of weights and computation",
    )
    return parser


def sampler_arguments():
    """A parser of the arguments that say how tokens are picked."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sampler", choices=SAMPLERS, default="greedy")
    parser.add_argument(
        "--temperature", type=positive(float), default=1.0, metavar="T"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="make a random sampler repeatable",
        default=argparse.SUPPRESS,
    )
    return parser


def positive(kind):
    """The type of an argument that is a number above 0."""

    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"expected a number above 0, received {text}"
            )
        return value

    parse.__name__ = kind.__name__  # Named in argparse's own errors.
    return parse


def load(args):
    """Loads the model that was asked for.

    Raises:
        CommandError: If that cannot be done.
    """
    with few_imports.importing():
        from keras_nlp_cache.models import CausalLM

    preset = find_preset(args)
    try:
        with few_imports.importing(preset):
            lm = CausalLM.from_preset(preset, dtype=args.dtype)
    except Exception as e:
        # Damaged files raise whatever the library that reads them raises.
        raise CommandError(
            f"cannot load the preset {preset!r}: {type(e).__name__}: {e}"
        ) from e
    garbage.keep_all()
    return lm


def find_preset(args):
    """The preset that was asked for, as a directory if it is a GGUF file."""
    from keras_nlp_cache import default_model
    from keras_nlp_cache.files import gguf_preset

    preset = getattr(args, "preset", None)
    keep = args.keep_quantized
    try:
        if preset is None:
            return default_model.preset(keep_quantized=keep)
        return gguf_preset.directory(preset, keep)
    except (ImportError, OSError, ValueError) as e:
        name = "the default model" if preset is None else repr(preset)
        raise CommandError(f"cannot convert {name}: {e}") from e


def sampler(args):
    """The sampler that was asked for."""
    import keras_hub

    config = {"temperature": args.temperature}
    if args.sampler != "greedy":
        config["seed"] = getattr(args, "seed", None)
    return getattr(keras_hub.samplers, SAMPLERS[args.sampler])(**config)
