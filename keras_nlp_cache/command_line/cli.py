"""The command line: `keras-nlp-cache generate`, `chat`, `steer`, `info`."""

import argparse
import functools
import importlib.metadata
import os
import pathlib
import sys
import time

from keras_nlp_cache import compile_cache
from keras_nlp_cache.command_line import batch_command
from keras_nlp_cache.command_line.model_arguments import CommandError
from keras_nlp_cache.command_line.model_arguments import load
from keras_nlp_cache.command_line.model_arguments import model_arguments
from keras_nlp_cache.command_line.model_arguments import positive
from keras_nlp_cache.command_line.model_arguments import sampler
from keras_nlp_cache.command_line.model_arguments import sampler_arguments

_BACKENDS = ("jax", "tensorflow", "torch")


def main(argv=None):
    """Runs the command line.

    Args:
        argv: Optional list of arguments. Defaults to those of the process.

    Returns:
        The exit status: 0, 1 if some of many prompts cannot be answered, 2
        for a mistake in what was asked, 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    if args.backend is not None:
        os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    compile_cache.for_programs()
    try:
        return args.run(args)
    except CommandError as e:
        print(f"keras-nlp-cache: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"\nkeras-nlp-cache: {e}" if str(e) else "", file=sys.stderr)
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
        parents=[
            common,
            _prompt(nargs="?"),
            model_arguments(256),
            sampler_arguments(),
        ],
        help="answer a prompt, or all in a file",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    batch_command.add_arguments(generate, positive(int))
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        parents=[common, model_arguments(256), sampler_arguments()],
        help="talk to a model, turn by turn",
        description="Talk to a model. It remembers what was said. Type /help "
        "for what else can be done.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    chat.add_argument(
        "--system",
        metavar="TEXT",
        help="what the model is told first",
        default=argparse.SUPPRESS,
    )
    chat.add_argument(
        "--load",
        metavar="FILE",
        help="go on with what /save wrote",
        default=argparse.SUPPRESS,
    )
    chat.set_defaults(run=_chat)

    steer = commands.add_parser(
        "steer",
        # Three answers take three times as long, and share a screen.
        parents=[common, _prompt(), model_arguments(64)],
        help="answer a prompt in three moods, steered by a control vector",
        description="Train a control vector on a contrast of two personas "
        "(happy and sad, by default), and answer a prompt with the vector "
        "subtracted, left out, and added.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    steer.add_argument(
        "--strength",
        type=positive(float),
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


def _prompt(nargs=None):
    """The arguments of commands that answer a prompt."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "prompt",
        nargs=nargs,
        default=argparse.SUPPRESS,
        help="a question, or with --raw any text",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="pass the prompt on as it is, without a chat template",
    )
    return parser


def _compiled(args):
    """The model that was asked for, ready to generate as it is to."""
    lm = load(args)
    lm.compile(sampler=sampler(args))
    return lm


def _generate(args):
    try:
        if batch_command.is_asked(args):
            load_model = functools.partial(_compiled, args)
            return batch_command.answer_all(args, load_model)
    except (ImportError, OSError, ValueError) as e:
        raise CommandError(e) from e
    _check_prompt(args.prompt)
    lm = _compiled(args)
    stream = lm.stream
    if lm.chat_template is not None and not args.raw:
        stream = lm.stream_chat
    times = [time.perf_counter()]
    try:
        for piece in _answer(stream, args.prompt, args.max_new_tokens, times):
            print(piece, end="", flush=True)
    finally:
        if len(times) > 1:
            print(flush=True)
    print(_speed(times), file=sys.stderr)
    return 0


def _check_prompt(prompt):
    if not prompt.strip():
        raise CommandError("expected a prompt, received an empty one")


def _answer(stream, prompt, max_new_tokens, times):
    """Yields an answer in pieces, and notes in `times` when each came."""
    try:
        for piece in stream(prompt, max_new_tokens):
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


def _chat(args):
    from keras_nlp_cache.command_line import chat_command

    if hasattr(args, "system") and hasattr(args, "load"):
        raise CommandError(
            "expected --system or --load, received both; what the model is "
            "told first is in the file"
        )
    lm = load(args)
    lm.compile(sampler=sampler(args))
    dialogue = chat_command.Dialogue(
        lm, args.max_new_tokens, getattr(args, "system", None)
    )
    if hasattr(args, "load"):
        dialogue.load(args.load)
    dialogue.run()
    return 0


def _steer(args):
    _check_prompt(args.prompt)
    # Mistakes come to light before the work that they would waste.
    personas = _personas(args)
    vector = _load_vector(args.vector) if personas is None else None
    _check_save(args)
    lm = load(args)
    lm.compile(sampler="greedy")

    from keras_nlp_cache.command_line import steer_command
    from keras_nlp_cache.surgery.control_vector import AddDirection

    def chat_prompt(text):
        return text if args.raw else steer_command.chat_prompt(lm, text)

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
            steered.stream,
            chat_prompt(args.prompt),
            args.max_new_tokens,
            times,
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
    from keras_nlp_cache import kernels
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
    rows["kernels"] = kernels.description()
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
