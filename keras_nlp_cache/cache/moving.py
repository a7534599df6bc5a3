"""Tokens out of a cache, and into another one of any size and policy.

On the host, for texts that outgrow their cache, and for files.
"""

import typing

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_nlp_cache.cache.kept import has_policy
from keras_nlp_cache.cache.kept import places
from keras_nlp_cache.cache.kept import read_slots
from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.cache.policies.state import is_state


class Tokens(typing.NamedTuple):
    """Keys or values of some tokens of one row, or a state that they made.

    Attributes:
        slots: int32 array `(N,)`, in ascending order. Of a state, the last slot
            that it knows of.
        stored: Array `(1, heads, N, head_dim)`, or an `Int8` of arrays. Of a
            state, that.
    """

    slots: typing.Any
    stored: typing.Any


def take_out(cache, filled, mark):
    """What a cache of one row holds of a text.

    Args:
        cache: Pairs of what is kept.
        filled: int. How many slots are filled.
        mark: int. How many slots were ever written. What was written after
            `filled` may have taken places.

    Returns:
        A tuple of pairs of `Tokens`, or of `Encoded` where the cache has them.
    """

    def taken(kept):
        if is_encoded(kept):
            return tree.map_structure(ops.convert_to_numpy, kept)
        if is_state(kept):
            last = np.arange(filled, dtype="int32")[-1:]
            return Tokens(last, ops.convert_to_numpy(kept.stored))
        slots = _slots(kept, filled)
        if has_policy(kept):
            lost = (slots >= kept.first_in_turns) & (
                slots + kept.count_in_turns < mark
            )
            slots = np.where(lost, -1, slots)
        order = np.argsort(slots)[(slots < 0).sum() :]
        return Tokens(
            slots[order],
            tree.map_structure(
                lambda x: ops.convert_to_numpy(x)[:, :, order], _stored(kept)
            ),
        )

    return tuple(tuple(map(taken, pair)) for pair in cache)


def put_in(backbone, tokens, filled, slots, dtype, policy):
    """A cache of one row that holds some tokens.

    Args:
        backbone: The backbone to make it for.
        tokens: From `take_out()`.
        filled: int. How many slots are filled.
        slots: int. How many slots there are to be.
        dtype: Optional floating dtype, as for `make_cache()`.
        policy: Policy, as for `make_cache()`.

    Returns:
        `(cache, mark)`: a cache of arrays, and how many slots count as written.

    Raises:
        ValueError: If tokens are missing that the policy keeps, or what an
            encoder returned.
    """
    empty = backbone.make_cache(1, slots, dtype, policy, zeros=_zeros)
    marks = [filled]

    def put(kept, some):
        if is_encoded(kept) or is_encoded(some):
            tree.assert_same_structure(kept, some)
            return tree.map_structure(
                lambda empty, x: x.astype(empty.dtype), kept, some
            )
        if is_state(kept):
            kept.stored[:] = some.stored
            return kept
        wanted = _slots(kept, filled)
        here = np.isin(wanted, some.slots)
        needed = np.arange(filled)
        if has_policy(kept):
            needed = kept.needed(filled)
        if not np.isin(needed, some.slots).all():
            raise ValueError(
                f"Expected the keys and values of {len(needed)} tokens, which "
                f"the cache policy {policy} keeps. Received those of "
                f"{len(some.slots)}. Compile the model with the policy that "
                "they were kept with."
            )
        where = np.searchsorted(some.slots, wanted[here])

        def fill(empty, x):
            empty[:, :, here] = x[:, :, where]

        stored = _stored(kept)
        tree.assert_same_structure(stored, some.stored)
        tree.map_structure(fill, stored, some.stored)
        if has_policy(kept):
            first = some.slots[some.slots >= kept.first_in_turns]
            if len(first) and first[0] > kept.first_in_turns:
                marks.append(int(first[0]) + kept.count_in_turns)
        return kept

    cache = tuple(
        tuple(map(put, *pair)) for pair in zip(empty, tokens, strict=True)
    )
    return cache, max(marks)


def filled_slots(tokens):
    """How many slots of a text are filled.

    Args:
        tokens: From `take_out()`.
    """
    of_text = next(x for y in tokens for x in y if not is_encoded(x))
    return int(max(of_text.slots, default=-1)) + 1


def _slots(kept, filled):
    """The slot that each place has after some tokens, -1 where none is."""
    if has_policy(kept):
        # Those before two more tokens, which are read behind them.
        slots = ops.convert_to_numpy(read_slots(kept, filled, 2))[0, :-2]
    else:
        slots = np.arange(int(places(kept)))
    return np.where(slots < filled, slots, -1).astype("int32")


def _stored(kept):
    return kept.stored if has_policy(kept) else kept


def _zeros(shape, dtype):
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return np.zeros(shape, dtype)
