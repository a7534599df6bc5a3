"""`keras-nlp-cache generate --input`: its arguments, and what it does."""

import argparse
import os
import sys

from keras_nlp_cache.command_line.model_arguments import find_preset

_ONLY_WITH_INPUT = ("output", "batch_size", "overwrite", "ray", "workers")


def add_arguments(parser, positive_int):
    """Adds the arguments of a batch job.

    Args:
        parser: An `argparse.ArgumentParser`.
        positive_int: A type for its arguments.
    """
    group = parser.add_argument_group(
        "many prompts",
        "Started again, a job goes on where it stopped.",
    )

    def add(name, **kwargs):
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, **kwargs)

    add(
        "input",
        metavar="FILE",
        help='answer all prompts in a file of JSON lines, {"prompt": "..."} '
        'or {"messages": [{"role": "user", "content": "..."}]}, with an "id" '
        "or without",
    )
    add("output", metavar="FILE", help="where to write answers, as JSON lines")
    add(
        "batch-size",
        type=positive_int,
        metavar="N",
        help="prompts to answer at once (default: 16)",
    )
    add(
        "overwrite",
        action="store_true",
        help="begin anew, whatever is in the output",
    )
    add(
        "ray",
        metavar="ADDRESS",
        help="generate on a Ray cluster, or on one of this machine (local)",
    )
    add(
        "workers",
        type=positive_int,
        metavar="N",
        help="how many copies of the model Ray is to run (default: one for "
        "each GPU, or without any, one for each machine)",
    )


def is_asked(args):
    """Whether a batch job is asked for, and not one answer.

    Raises:
        ValueError: If both are, or neither, or arguments do not go together.
    """
    has_prompt, has_input = hasattr(args, "prompt"), hasattr(args, "input")
    if has_prompt == has_input:
        received = "both" if has_prompt else "neither"
        raise ValueError(
            f"expected either a prompt or --input, received {received}"
        )
    for name in _ONLY_WITH_INPUT:
        if hasattr(args, name) and not has_input:
            raise ValueError(
                f"expected --{name.replace('_', '-')} with --input, received "
                "it with a prompt"
            )
    if has_input and not hasattr(args, "output"):
        raise ValueError("expected --output with --input, received none")
    if hasattr(args, "workers") and not hasattr(args, "ray"):
        raise ValueError("expected --workers with --ray, received it without")
    return has_input


def answer_all(args, load):
    """Runs the job.

    Args:
        args: What was parsed.
        load: Function without arguments that returns the model. Pickled.

    Returns:
        The exit status: 1 if there are prompts that cannot be answered.

    Raises:
        ImportError, OSError, ValueError: With what to tell the user.
        KeyboardInterrupt: With how far it came.
    """
    import keras_hub

    from keras_nlp_cache import batch_job
    from keras_nlp_cache.batch_job.prompts_file import PromptsFile
    from keras_nlp_cache.files.chat_template import ChatTemplate

    # Mistakes come to light before the model is loaded.
    with PromptsFile(args.input, None if args.raw else _any_text):
        pass
    kwargs = {
        name: getattr(args, name)
        for name in ("batch_size", "overwrite", "workers")
        if hasattr(args, name)
    }
    kwargs["max_new_tokens"] = args.max_new_tokens
    if hasattr(args, "ray"):
        # Processes on this machine need not be where this one is.
        if os.path.exists(getattr(args, "preset", "")):
            args.preset = os.path.abspath(args.preset)
        start, model = batch_job.run_on_ray, load
        kwargs["address"] = args.ray
    else:
        start, model = batch_job.run, load()
    if not args.raw:
        preset = find_preset(args)
        cls = keras_hub.models.CausalLMPreprocessor
        kwargs |= _chat_form(
            ChatTemplate.from_preset(preset), cls.from_preset(preset).tokenizer
        )
    summary = start(model, args.input, args.output, **kwargs)
    answered = summary.prompts - summary.earlier - summary.errors
    words = f"[{answered} of {summary.prompts} prompts answered"
    if summary.earlier:
        words += f", {summary.earlier} done before"
    if summary.errors:
        words += f', {summary.errors} with an "error" in {args.output}'
    print(words + "]", file=sys.stderr)
    return 1 if summary.errors else 0


def _any_text(messages):
    return ""


def _chat_form(template, tokenizer):
    """How messages are to be read, as arguments of a batch job."""
    if template is None:
        return {"chat_prompt": _question}
    # Keras' backend is not known before arguments are parsed.
    from keras_nlp_cache.generate.template_tokens import TemplateTokens

    tokens = TemplateTokens(tokenizer, template)

    def read(messages):
        spans = tokens.read(tokens.render(messages))
        return [x for span in spans for x in span.token_ids]

    return {"chat_prompt": read, "stop_token_ids": tokens.stop_ids}


def _question(messages):
    """What a single message says."""
    if [x["role"] for x in messages] != ["user"]:
        raise ValueError(
            "expected one message of a user, as the preset has no chat "
            f"template, received {len(messages)} messages"
        )
    return messages[0]["content"]
