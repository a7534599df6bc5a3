"""Answers to prompts of which some cannot be answered."""

import json

from keras_nlp_cache.generate import session_file
from keras_nlp_cache.generate.loops.sampling import seed_of


def answer_each(lm, prompts, **options):
    """Answers prompts, and goes on after those that cannot be.

    Args:
        lm: A `CausalLM`.
        prompts: Iterable of what `CausalLM.generate_many()` takes.
        **options: As for `CausalLM.generate_many()`. By default, the seed is
            that of the sampler, whatever was drawn before.

    Yields:
        `(index, answer)` for each prompt in the order in which they are done,
        where `answer` is a dictionary with an `"answer"`, or an `"error"`.

    Raises:
        ValueError: If prompts can be answered one by one, and not together.
    """
    options.setdefault("seed", seed_of(lm.sampler))
    numbered = enumerate(prompts)
    more = True
    while more:
        under_way = {}  # By the index that the model knows them by.
        try:
            results = lm.generate_many(
                _noting(numbered, under_way), return_dict=True, **options
            )
            for i, result in results:
                index, _ = under_way.pop(i)
                yield index, _told(result)
            more = False
        except ValueError:
            # It does not say of which prompt. Each by itself will.
            refused = False
            for index, prompt in under_way.values():
                answer = _answer_one(lm, prompt, options)
                refused = refused or "error" in answer
                yield index, answer
            if not refused:
                raise


def identity(lm):
    """What a model is known by, a dictionary of JSON's types."""
    sampler = lm.sampler
    config = sampler.get_config() if hasattr(sampler, "get_config") else {}
    return plain(
        {
            **config,
            "weights": session_file.fingerprint(lm.backbone),
            "sampler": type(sampler).__name__,
            "cache_dtype": getattr(lm, "cache_dtype", None),
            "cache_policy": repr(getattr(lm, "cache_policy", None)),
        }
    )


def plain(x):
    """A dictionary of JSON's types, and of the types of what is none."""
    text = json.dumps(x, default=lambda value: type(value).__name__)
    return json.loads(text)


def _noting(numbered, under_way):
    for i, (index, prompt) in enumerate(numbered):
        under_way[i] = index, prompt
        yield prompt


def _answer_one(lm, prompt, options):
    try:
        ((_, result),) = lm.generate_many([prompt], return_dict=True, **options)
    except ValueError as e:
        return {"error": str(e)}
    return _told(result)


def _told(result):
    """What is written of a result."""
    return {
        "answer": result["text"],
        "finish_reason": result["finish_reason"],
        "tokens": len(result["token_ids"]),
    }
