"""Checks that prompts have a placeholder for each image, or clip, of theirs."""

import numpy as np
from keras import ops

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


def clips_of(inputs):
    """The clip of each prompt, empty where there is none.

    Args:
        inputs: Dictionary of `prompts`, strings, and of `audio`: floating
            numbers `(samples,)` for one prompt, and `(batch, samples)` or a
            list for several, of which some may be `None`.

    Returns:
        A list with a float32 array `(samples,)` for each prompt.

    Raises:
        ValueError: If `audio` is something else.
    """
    prompts, audio = inputs["prompts"], inputs.get("audio")
    count = 1 if isinstance(prompts, str) else len(prompts)
    if audio is None:
        audio = [None] * count
    elif count == 1 and isinstance(prompts, str):
        is_list = isinstance(audio, (list, tuple)) and len(audio) == 1
        audio = audio if is_list else [audio]
    clips = [_clip(x) for x in audio] if hasattr(audio, "__len__") else []
    if len(clips) == count and not any(x is None for x in clips):
        return clips
    received = getattr(audio, "shape", None) or [
        tuple(getattr(x, "shape", ())) or type(x).__name__ for x in audio
    ]
    raise ValueError(
        "Expected `audio` to be a clip for each of "
        f"{count} `prompts`, floating numbers of the shape (samples,). "
        f"Received: {received}. Mix channels, divide integers by the largest "
        "there is, and pass `None` for a prompt without a clip."
    )


def _clip(x):
    """A clip as an array, `None` if it is something else."""
    if x is None:
        return np.zeros((0,), "float32")
    while isinstance(x, (list, tuple)) and len(x) == 1:
        (x,) = x
    try:
        x = np.asarray(ops.convert_to_numpy(x))
    except (TypeError, ValueError):
        return None
    is_floating = np.issubdtype(x.dtype, np.floating) or not x.size
    return x.astype("float32") if x.ndim == 1 and is_floating else None


def check_clips(inputs, preprocessor):
    """Compares prompts with their clips, before a preprocessor hears them.

    Args:
        inputs: As for `clips_of()`.
        preprocessor: The preprocessor of a task.

    Raises:
        ValueError: If there are more of the ones than of the others, more than
            one for a prompt, or if the preprocessor reads none.
    """
    prompts = inputs.get("prompts")
    if prompts is None:
        return
    placeholder = reading.mark_of("clip", preprocessor)
    if placeholder is None:
        if inputs.get("audio") is not None:
            raise ValueError(
                "Expected a preprocessor with an `audio_converter` for "
                f"`audio`. Received: a {type(preprocessor).__name__} without "
                "one."
            )
        return
    wanted = _counts(prompts, placeholder)
    if wanted is None:
        return
    given = [int(len(x) > 0) for x in clips_of(inputs)]
    if wanted != given:
        raise ValueError(
            f"Expected one {placeholder!r} in each of `prompts` for which "
            "there is `audio`, and none in others: the preprocessor reads one "
            f"clip for a prompt. Received: {wanted} of them, for {given} clips."
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
