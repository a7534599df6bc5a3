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


def compared(answers):
    """Says of each answer how much worse it is than in the first precision.

    Args:
        answers: Dictionary from names of workers to what they answered. Those
            of a system are compared: a perplexity that is a hundredth larger
            is `worse` by 0.01.
    """
    first, result = {}, {}
    for name, answer in answers.items():
        nats = answer["nats_per_token"]
        before = first.setdefault(name.partition(" ")[0], nats)
        result[name] = {**answer, "worse": math.expm1(nats - before)}
    return result
