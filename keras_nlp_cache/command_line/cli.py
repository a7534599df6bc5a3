"""The command line: `keras-nlp-cache generate`, `steer` and `info`."""

import argparse
import importlib.metadata
import os
import pathlib
import sys
import time

_SAMPLERS = {
    "greedy": "GreedySampler",
    "top_k": "TopKSampler",
    "top_p": "TopPSampler",
    "random": "RandomSampler",
}
_BACKENDS = ("jax", "tensorflow", "torch")


class CommandError(Exception):
    """A mistake to be explained in one line, without a traceback."""


def main(argv=None):
    """Runs the command line.

    Args:
        argv: Optional list of arguments. Defaults to those of the process.

    Returns:
        The exit status: 0, 2 for a mistake in what was asked, 130 if
        interrupted.
    """
    args = _parser().parse_args(argv)
    if args.backend is not None:
        os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return args.run(args)
    except CommandError as e:
        print(f"keras-nlp-cache: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once
        # more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-nlp-cache",
        description="Run Keras language models through their functional graph.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--backend",
        choices=_BACKENDS,
        help="Keras backend (default: KERAS_BACKEND, or Keras' own setting)",
    )

    generate = commands.add_parser(
        "generate",
        parents=[common, _answering(max_new_tokens=256)],
        help="answer a prompt",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.add_argument("--sampler", choices=_SAMPLERS, default="greedy")
    generate.add_argument(
        "--temperature", type=_positive(float), default=1.0, metavar="T"
    )
    generate.add_argument(
        "--seed",
        type=int,
        help="make a random sampler repeatable",
        default=argparse.SUPPRESS,
    )
    generate.set_defaults(run=_generate)

    steer = commands.add_parser(
        "steer",
        # Three answers take three times as long, and share a screen.
        parents=[common, _answering(max_new_tokens=64)],
        help="answer a prompt in three moods, steered by a control vector",
        description="Train a control vector on a contrast of two personas "
        "(happy and sad, by default), and answer a prompt with the vector "
        "subtracted, left out, and added.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    steer.add_argument(
        "--strength",
        type=_positive(float),
        default=3.0,
        metavar="X",
        help="what to multiply the vector by",
    )
    for name in ("positive", "negative"):
        steer.add_argument(
            f"--{name}",
            nargs="+",
            metavar="TEXT",
            help=f"personas of the {name} side, as in `extremely TEXT`",
            default=argparse.SUPPRESS,
        )
    steer.add_argument(
        "--vector",
        metavar="FILE",
        help="use a vector from a .gguf or .safetensors file, and train none",
        default=argparse.SUPPRESS,
    )
    steer.add_argument(
        "--save",
        metavar="FILE",
        help="keep the trained vector in a .gguf or .safetensors file",
        default=argparse.SUPPRESS,
    )
    steer.set_defaults(run=_steer)

    info = commands.add_parser(
        "info",
        parents=[common],
        help="print versions, backend, devices and model families",
    )
    info.set_defaults(run=_info)
    return parser


def _answering(max_new_tokens):
    """The arguments of commands that answer a prompt."""
    answer = argparse.ArgumentParser(add_help=False)
    answer.add_argument("prompt", help="a question, or with --raw any text")
    answer.add_argument(
        "--preset",
        help="a keras_hub preset or hub handle, or the path of a local preset "
        "or Hugging Face directory, or of a GGUF file (default: "
        "SmolLM2-135M-Instruct)",
        default=argparse.SUPPRESS,
    )
    answer.add_argument(
        "--max-new-tokens",
        type=_positive(int),
        default=max_new_tokens,
        metavar="N",
    )
    answer.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of weights and computation",
    )
    answer.add_argument(
        "--raw",
        action="store_true",
        help="pass the prompt on as it is, without a chat template",
    )
    return answer


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"expected a number above 0, received {text}"
            )
        return value

    parse.__name__ = kind.__name__  # Named in argparse's own errors.
    return parse


def _generate(args):
    _check_prompt(args.prompt)
    preset = _preset(args)
    lm = _load(preset, args.dtype)
    lm.compile(sampler=_sampler(args))
    prompt = args.prompt
    if not args.raw:
        prompt = _chat_prompt(preset, prompt, lm.preprocessor)
    times = [time.perf_counter()]
    try:
        for piece in _answer(lm, prompt, args.max_new_tokens, times):
            print(piece, end="", flush=True)
    finally:
        if len(times) > 1:
            print(flush=True)
    print(_speed(times), file=sys.stderr)
    return 0


def _check_prompt(prompt):
    if not prompt.strip():
        raise CommandError("expected a prompt, received an empty one")


def _answer(lm, prompt, max_new_tokens, times):
    """Yields an answer in pieces, and notes in `times` when each came."""
    try:
        for piece in lm.stream(prompt, max_new_tokens):
            times.append(time.perf_counter())
            yield piece
    except ValueError as e:
        raise CommandError(e) from e


def _speed(times):
    """Describes when generation began, and when each token came."""
    count = len(times) - 1
    text = f"[{count} tokens"
    if count > 1:
        # The first token waits for the prompt and for the compiler, the
        # second once more for the compiler.
        text += f", the first two after {times[2] - times[0]:.2f} s"
    if count > 2:
        rate = (count - 2) / (times[-1] - times[2])
        text += f", then {rate:.1f} tokens/s"
    return text + "]"


def _preset(args):
    """The preset that was asked for, as a directory if it is a GGUF file."""
    from keras_nlp_cache import default_model
    from keras_nlp_cache.files import gguf_preset

    preset = getattr(args, "preset", None)
    try:
        if preset is None:
            return default_model.preset()
        return gguf_preset.directory(preset)
    except (ImportError, OSError, ValueError) as e:
        name = "the default model" if preset is None else repr(preset)
        raise CommandError(f"cannot convert {name}: {e}") from e


def _load(preset, dtype):
    from keras_nlp_cache.models import CausalLM

    try:
        return CausalLM.from_preset(preset, dtype=dtype)
    except Exception as e:
        # Damaged files raise whatever the library that reads them raises.
        raise CommandError(
            f"cannot load the preset {preset!r}: {type(e).__name__}: {e}"
        ) from e


def _sampler(args):
    import keras_hub

    config = {"temperature": args.temperature}
    if args.sampler != "greedy":
        config["seed"] = getattr(args, "seed", None)
    return getattr(keras_hub.samplers, _SAMPLERS[args.sampler])(**config)


def _chat_prompt(preset, question, preprocessor):
    from keras_nlp_cache.files.chat_template import chat_prompt

    tokenizer = preprocessor.tokenizer
    start_token = None
    if getattr(preprocessor, "add_start_token", False):
        start_token = tokenizer.id_to_token(tokenizer.start_token_id)
    return chat_prompt(preset, question, start_token)


def _steer(args):
    _check_prompt(args.prompt)
    # Mistakes come to light before the work that they would waste.
    personas = _personas(args)
    vector = _load_vector(args.vector) if personas is None else None
    _check_save(args)
    preset = _preset(args)
    lm = _load(preset, args.dtype)
    lm.compile(sampler="greedy")

    def chat_prompt(text):
        if args.raw:
            return text
        return _chat_prompt(preset, text, lm.preprocessor)

    from keras_nlp_cache.command_line import steer_command
    from keras_nlp_cache.surgery.control_vector import AddDirection

    try:
        if vector is None:
            vector = steer_command.train(lm, *personas, chat_prompt)
        if hasattr(args, "save"):
            vector.save(args.save)
        steered = vector.apply(lm)
    except (ImportError, OSError, ValueError) as e:
        raise CommandError(e) from e
    # The preset may have been steered before.
    (layer,) = (
        x
        for x in steered.backbone.layers
        if isinstance(x, AddDirection) and x not in lm.backbone.layers
    )
    # One model for all three: what is compiled for the first serves the next.
    answers = {}
    for strength in (-args.strength, 0.0, args.strength):
        heading = f"strength {strength:+g}" if strength else "strength 0"
        layer.strength.assign(strength)
        times = [time.perf_counter()]
        pieces = _answer(
            steered, chat_prompt(args.prompt), args.max_new_tokens, times
        )
        answers[heading] = "".join(pieces)
        print(f"{heading}: {_speed(times)}", file=sys.stderr)
    steer_command.show(answers)
    return 0


def _personas(args):
    """The two lists of personas to train on, `None` if none is to be."""
    from keras_nlp_cache.command_line import steer_command

    sides = ("positive", "negative")
    if hasattr(args, "vector"):
        for name in (*sides, "save"):
            if hasattr(args, name):
                raise CommandError(
                    f"expected --vector or --{name}, received both; a vector "
                    "from a file is not trained"
                )
        return None
    if not any(hasattr(args, name) for name in sides):
        return steer_command.POSITIVE, steer_command.NEGATIVE
    positive, negative = (getattr(args, name, []) for name in sides)
    if len(positive) != len(negative):
        raise CommandError(
            "expected as many --positive as --negative personas, received "
            f"{len(positive)} and {len(negative)}"
        )
    return positive, negative


def _load_vector(path):
    from keras_nlp_cache.surgery.control_vector import ControlVector

    try:
        return ControlVector.load(path)
    except (ImportError, OSError, ValueError) as e:
        raise CommandError(e) from e


def _check_save(args):
    from keras_nlp_cache.surgery import vector_files

    if not hasattr(args, "save"):
        return
    try:
        vector_files.check_path(args.save)
    except ValueError as e:
        raise CommandError(e) from e
    if not pathlib.Path(args.save).parent.is_dir():
        raise CommandError(
            "expected --save to name a file in a folder that exists, received "
            f"{args.save!r}"
        )


def _info(args):
    import keras
    import keras_hub

    import keras_nlp_cache
    from keras_nlp_cache import drop_in
    from keras_nlp_cache import models  # noqa: F401 (fills the list below)

    families = sorted(
        cls.__name__.removesuffix("Backbone")
        for cls in drop_in.replacements()
        if issubclass(cls, keras_hub.models.Backbone)
    )
    rows = {
        "keras-nlp-cache": keras_nlp_cache.__version__,
        "keras-hub": keras_hub.__version__,
        "keras": keras.__version__,
    }
    for package in _BACKENDS:
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["backend"] = keras.config.backend()
    rows["devices"] = ", ".join(_devices(keras.config.backend()))
    rows["families"] = ", ".join(families)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    not_covered = drop_in.not_covered()
    width = max(map(len, not_covered))
    print("\nof keras-hub, not covered:")
    for name, reason in not_covered.items():
        print(f"{name:<{width}}  {reason}")
    return 0


def _devices(backend):
    if backend == "jax":
        import jax

        return [str(device) for device in jax.devices()]
    if backend == "tensorflow":
        import tensorflow as tf

        return [device.name for device in tf.config.list_logical_devices()]
    import torch

    count = torch.cuda.device_count()
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
