"""What precision costs: the perplexity of a text."""

import math
import pathlib

from tests.prose import TEXT


def token_ids(preset, path=None):
    """The tokens of a text file, or of the text that tests have.

    Args:
        preset: str. Path of a Hugging Face directory.
        path: Optional path of a file.
    """
    import transformers

    if not (pathlib.Path(preset) / "tokenizer.json").exists():
        raise SystemExit(
            "Perplexity takes a model that has learned something, with a "
            "tokenizer. Received: one of random weights. Use --model smollm2."
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(preset)
    text = path.read_text(encoding="utf-8") if path else TEXT
    return tokenizer(text)["input_ids"]


def measured(args, running):
    """What each worker says of the text, and how much worse that is.

    `worse` is beside the same system in the first precision that it has: a
    perplexity that is a hundredth larger is 0.01.
    """
    tokens = token_ids(args.preset, args.text)
    systems, first = {}, {}
    for name, worker in running.items():
        found = worker.ask("perplexity", tokens=tokens)
        system = name.partition(" ")[0]
        before = first.setdefault(system, found["nats_per_token"])
        systems[name] = {
            "precision": str(worker.precision),
            **found,
            "worse": math.expm1(found["nats_per_token"] - before),
            "tokens": len(tokens),
        }
    return systems
