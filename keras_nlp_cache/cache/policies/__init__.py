"""Policies: which tokens a cache keeps, and how.

A policy makes what is kept of the keys or values of one layer, with
`Policy.make()`. What it makes is either stored slot by slot, or an object that
says how tokens get their places; see `cache/kept.py`. A further policy is one
more module like `rotating.py`. Nothing else knows which there are.
"""

from keras_nlp_cache.cache.policies.full import Full
from keras_nlp_cache.cache.policies.policy import Policy
from keras_nlp_cache.cache.policies.rotating import Rotating
from keras_nlp_cache.cache.policies.sinks import SinksAndWindow

__all__ = ["Full", "Policy", "Rotating", "SinksAndWindow", "get"]

_NAMED = {
    "full": Full,
    "int8": lambda: Full(storage="int8"),
    "rotating": Rotating,
}


def get(policy):
    """The policy that a user means.

    Args:
        policy: A `Policy`, its name, or `None` for the one that keeps all.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If it is neither.
    """
    if policy is None:
        return Full()
    if isinstance(policy, str) and policy in _NAMED:
        return _NAMED[policy]()
    if not isinstance(policy, Policy):
        raise ValueError(
            "Expected a cache policy to be one of "
            f"{sorted(_NAMED)}, or a `Full`, `Rotating` or `SinksAndWindow`. "
            f"Received: {policy!r}."
        )
    return policy
