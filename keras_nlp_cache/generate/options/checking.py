"""What is refused of options, each alone."""

import collections.abc
import math
import numbers

import numpy as np
from keras import ops


def is_int(x):
    """Whether something is an integer, and no boolean."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def number(x):
    """A number as float32 has it, `None` for anything else and for NaN."""
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        return None
    try:
        with np.errstate(over="ignore"):
            x = float(np.float32(float(x)))
    except OverflowError:  # Of an integer.
        return None
    return None if math.isnan(x) else x


def penalty(name, x, neutral, positive=False):
    """Checks a penalty, `None` if there is none.

    Args:
        name: str.
        x: What a user passed.
        neutral: float. The penalty that changes nothing.
        positive: bool. Whether it is to be above 0.

    Returns:
        A float.
    """
    if x is None:
        return neutral
    value = number(x)
    if value is None or math.isinf(value) or (positive and value <= 0):
        above = " above 0" if positive else ""
        raise ValueError(
            f"Expected `{name}` to be a finite number{above}. Received: {x!r}. "
            f"Pass {neutral} for no penalty."
        )
    return value


def share(name, x):
    """Checks a number from 0 to 1, where `None` is 0."""
    if x is None:
        return 0.0
    value = number(x)
    if value is None or not 0 <= value <= 1:
        raise ValueError(
            f"Expected `{name}` to be a number from 0 to 1. Received: {x!r}. "
            "Pass 0 to keep all tokens."
        )
    return value


def biases(name, x):
    """Checks what is added to the logits of some tokens, `None` for nothing.

    Returns:
        A dictionary from int to float.
    """
    if x is None:
        return {}
    expected = (
        f"Expected `{name}` to be a dictionary from token ids to finite "
        "numbers, or -inf for a token that is never to come. "
    )
    if not isinstance(x, collections.abc.Mapping):
        raise ValueError(f"{expected}Received: {x!r}.")
    checked = {}
    for token_id, value in x.items():
        bias = number(value)
        if not is_int(token_id) or bias is None or bias == math.inf:
            raise ValueError(f"{expected}Received: {token_id!r}: {value!r}.")
        checked[int(token_id)] = bias
    return checked


def strings(name, x):
    """Checks strings that are not empty: one, several or `None`.

    Returns:
        A tuple of strings, each once.
    """
    if x is None:
        return ()
    found = (x,) if isinstance(x, str) else _several(x)
    if found is None or not all(isinstance(y, str) for y in found):
        raise ValueError(
            f"Expected `{name}` to be a string or a sequence of strings. "
            f"Received: {x!r}."
        )
    if "" in found:
        raise ValueError(
            f"Expected `{name}` to hold no empty string, which is everywhere. "
            f"Received: {x!r}. Leave it out."
        )
    return tuple(dict.fromkeys(found))


def words(name, x):
    """Checks words, each a string or a sequence of token ids.

    Returns:
        A tuple of strings and of tuples of ints, each once.
    """
    if x is None:
        return ()
    found = None if isinstance(x, str) else _several(x)
    if found is None:
        raise ValueError(
            f"Expected `{name}` to be a sequence of strings or of lists of "
            f"token ids. Received: {x!r}. Put one word in a list."
        )
    return tuple(dict.fromkeys(_word(name, y) for y in found))


def _word(name, x):
    """A word as a string or a tuple of ints."""
    if not isinstance(x, str):
        token_ids = _several(x)
        if token_ids is None or not all(map(is_int, token_ids)):
            raise ValueError(
                f"Expected each of `{name}` to be a string or a list of token "
                f"ids. Received: {x!r}."
            )
        x = tuple(map(int, token_ids))
    if not x:
        raise ValueError(
            f"Expected each of `{name}` to have a token at least. Received: "
            f"{x!r}. Leave it out."
        )
    return x


def _several(x):
    """The elements of a collection, `None` for what is none."""
    if ops.is_tensor(x):
        x = ops.convert_to_numpy(x)
    if isinstance(x, np.ndarray):
        x = x.tolist()
    if isinstance(x, (str, bytes, collections.abc.Mapping)):
        return None
    return list(x) if isinstance(x, collections.abc.Collection) else None


def count(name, x):
    """Checks an integer of 0 or more, or `None`."""
    if x is not None and not (is_int(x) and x >= 0):
        raise ValueError(
            f"Expected `{name}` to be `None` or an integer of 0 or more, the "
            f"number of likely tokens to tell. Received: {x!r}."
        )
    return None if x is None else int(x)


def function(name, x):
    """Checks something to call, or `None`."""
    if x is not None and not callable(x):
        raise ValueError(
            f"Expected `{name}` to be `None` or a function of token ids, "
            f"logits and lengths that returns logits. Received: {x!r}."
        )
    return x


def in_vocabulary(name, token_ids, size):
    """Checks that a model knows token ids, of which there may be none."""
    wrong = sorted({x for x in token_ids if not 0 <= x < size})
    if wrong:
        raise ValueError(
            f"Expected `{name}` to have token ids from 0 to {size - 1}, the "
            f"vocabulary of the model. Received: {wrong}."
        )
