"""How keys or values are kept, whatever the policy.

What is *kept* of keys or of values is *stored* as a tensor `(B,
key_value_heads, S, head_dim)`, or as an `Int8`, in places that belong to slots
one after the other. Or it is an object of a policy, which says otherwise: a
named tuple with something `stored`, with the methods `update()`, `read_slots()`
and `can_go_back()` that functions of this module call, `sees()` and `nearer()`
where it has something to say there, and with what `moving.py` asks for. Of all
tensors in it, the first axis is the batch; of what is stored, the third are the
places.
"""

from keras import ops
from keras import tree

from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.slots import slots


def update(kept, x, index):
    """Keeps the keys or values of some more tokens.

    Args:
        kept: What is kept up to now.
        x: Tensor `(B, key_value_heads, T, head_dim)`.
        index: int32, `()` or `(B,)`. The slot of the first of the tokens.

    Returns:
        `(kept, read)`: what is kept now, and what attention reads of it, a
        tensor or an `Int8`.
    """
    if has_policy(kept):
        return kept.update(x, index)
    written = write(kept, x, index)
    return written, written


def read_slots(kept, index, length):
    """The slots of what attention reads, in the order in which it does.

    Args:
        kept: What is kept before a call.
        index: int32, `()` or `(B,)`. The slot of the first of its tokens.
        length: int. How many tokens it has.

    Returns:
        int32 `(B or 1, S)`, negative where there is nothing to read yet.
    """
    if has_policy(kept):
        return kept.read_slots(index, length)
    return slots(0, places(kept))


def sees(kept, read, distance):
    """What of that a query may attend to, as far as what is kept decides.

    Args:
        kept: What is kept before a call.
        read: int32 `(B or 1, S)`, from `read_slots()`.
        distance: int32 `(B or 1, T, S)`. How many slots they are behind.

    Returns:
        bool `(B or 1, 1 or T, S)`, or `None` for all.
    """
    if not has_policy(kept):
        return None
    is_there = read[:, None, :] >= 0
    if not hasattr(kept, "sees"):
        return is_there
    return ops.logical_and(is_there, kept.sees(read, distance))


def nearer(kept, index, length):
    """How much nearer than they are the first `kept.count` tokens seem to be.

    Args:
        kept: What is kept.
        index: int32, `()` or `(B,)`. The slot of the first of the queries.
        length: int. How many queries there are.

    Returns:
        int32 `(B or 1, T)`, or `None` if all are where they are.
    """
    if not hasattr(kept, "nearer"):
        return None
    return kept.nearer(slots(index, length))


def can_go_back(cache, filled, to):
    """Whether a text can go on from an earlier token as if nothing followed.

    Args:
        cache: Pairs of what is kept.
        filled: int. How many slots were ever written.
        to: int. How many of them are to count.
    """
    return all(
        kept.can_go_back(filled, to)
        for pair in cache
        for kept in pair
        if has_policy(kept)
    )


def spare(cache):
    """How many tokens may be written that are then not part of the text.

    Returns:
        int, or `None` for any number: no token takes the place of another.
    """
    spares = [kept.spare for pair in cache for kept in pair if has_policy(kept)]
    return min((x for x in spares if x is not None), default=None)


def has_policy(kept):
    """Whether places belong to other slots than those of their number."""
    return hasattr(kept, "stored")


def places(stored):
    """For how many tokens there is a place."""
    return ops.shape(as_tensor(stored))[2]


def as_tensor(stored):
    """A tensor with a place for each token, of what is stored."""
    return tree.flatten(stored)[0]


def write(stored, x, place):
    """Stores tokens in places that lie side by side.

    Args:
        stored: What is stored up to now.
        x: Tensor `(B, key_value_heads, T, head_dim)`.
        place: int32, `()` or `(B,)`. The place of the first token.
    """
    return tree.map_structure(
        lambda old, new: access().write(old, new, place),
        stored,
        as_stored(x, stored),
    )


def put(stored, x, where):
    """Stores tokens in any places, int32 `(B or 1, T)`, no two alike."""
    return tree.map_structure(
        lambda old, new: access().put(old, new, where),
        stored,
        as_stored(x, stored),
    )


def join(stored, x):
    """What is stored, and more tokens behind it."""
    return tree.map_structure(
        lambda old, new: ops.concatenate([old, new], axis=2),
        stored,
        as_stored(x, stored),
    )


def as_stored(x, like):
    """Keys or values in the form in which others are stored."""
    if isinstance(like, Int8):
        return Int8.of(x)
    return ops.cast(x, like.dtype)
