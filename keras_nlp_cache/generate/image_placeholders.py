"""Checks that prompts have a placeholder for each of their images."""

import numpy as np

from keras_nlp_cache.generate import reading


def check_placeholders(inputs, placeholder, most=None):
    """Compares prompts with their images, before a preprocessor sees them.

    Args:
        inputs: Dictionary of `prompts`, strings, and of `images`. Of what is
            counted otherwise, nothing is said.
        placeholder: str, what stands for an image.
        most: Optional int. How many images a preprocessor reads of a prompt.

    Raises:
        ValueError: If there are more of the ones than of the others, or more
            than a preprocessor reads.
    """
    prompts, images = inputs.get("prompts"), inputs.get("images")
    if prompts is None:
        return
    wanted = _counts(prompts, placeholder)
    if isinstance(prompts, str) and images is not None:
        images = [images]
    given = [0] * len(wanted or ()) if images is None else _images(images)
    if most is not None and given and max(given) > most:
        raise ValueError(
            f"Expected at most {most} images for each of `prompts`, the "
            "preprocessor's `max_images_per_prompt`. Received: "
            f"{list(given)}."
        )
    if None in (wanted, given) or list(wanted) == list(given):
        return
    raise ValueError(
        f"Expected as many {placeholder!r} in each of `prompts` as there are "
        f"`images` for it. Received: {list(wanted)} of them, for "
        f"{list(given)} images."
    )


def of_each_prompt(prompts, given, placeholder, name, rank):
    """Divides images among prompts, by the placeholders in these.

    Args:
        prompts: List of strings.
        given: Arrays, all in one, in a list, or in a list for each prompt. Or
            `None`.
        placeholder: str, what stands for one of them.
        name: str, what they are called.
        rank: int. How many axes one of them has.

    Returns:
        A list with a list of arrays for each prompt.

    Raises:
        ValueError: If there are more of the ones than of the others.
    """
    found = [] if given is None else _flat(given, rank)
    wanted, counts = [x.count(placeholder) for x in prompts], len(found)
    if isinstance(given, (list, tuple)) and len(given) == len(prompts):
        if any(isinstance(x, (list, tuple)) for x in given):
            counts = [len(_flat(x, rank)) for x in given]
    if counts != wanted and counts != sum(wanted):
        raise ValueError(
            f"Expected as many {placeholder!r} in `prompts` as there are "
            f"`{name}`. Received: {wanted} of them, for {counts} {name}."
        )
    ends = np.cumsum(wanted)
    return [
        found[end - count : end] for count, end in zip(wanted, ends.tolist())
    ]


def _flat(given, rank):
    """A list of arrays, of one with some more axes or of a nested list."""
    if len(getattr(given, "shape", ())) == rank:
        return [given]
    return [y for x in given for y in _flat(x, rank)]


def _counts(prompts, placeholder):
    """How many there are in each of some strings, `None` if it is not known."""
    if isinstance(prompts, str):
        return [prompts.count(placeholder)]
    strings = reading.texts(prompts)
    if strings is None:
        return None
    return [text.count(placeholder) for text in strings]


def _images(images):
    """How many images there are for each prompt, `None` if it is not known."""
    found = []
    for x in images:
        rank = len(getattr(x, "shape", ()))
        if not isinstance(x, (list, tuple)) and rank not in (3, 4):
            return None
        found.append(1 if rank == 3 else len(x))
    return found
