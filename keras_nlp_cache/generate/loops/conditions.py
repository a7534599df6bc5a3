"""What a model is when something is compiled for it."""

import keras
import numpy as np
from keras_hub.samplers import Sampler

from keras_nlp_cache.device import constants


class Conditions:
    """What a model is when something is compiled for it.

    Values of variables are not part of it. Equal to others if nothing else
    that was compiled has changed.

    Args:
        lm: A `CausalLM`.
        *methods: Names of methods that are called.
        attributes: bool. Whether attributes of the sampler matter, such as its
            temperature.
    """

    def __init__(self, lm, *methods, attributes=True):
        sampler, base = lm.sampler, getattr(lm.sampler, "base_sampler", None)
        objects = [sampler, base, *lm.variables]
        for name in methods:
            objects += [vars(lm).get(name), getattr(type(lm), name)]
        self._objects = objects
        self._values = (
            lm.run_eagerly,
            lm.generation_jit_compile,
            lm.cache_dtype,
            lm.cache_policy,
            keras.config.floatx(),
            constants(),
            _state(sampler) if attributes else None,
        )

    def __eq__(self, other):
        return (
            len(self._objects) == len(other._objects)
            and all(a is b for a, b in zip(self._objects, other._objects))
            and self._values == other._values
        )


class _Identity:
    """Compares equal to what is the same object, which it keeps alive."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.x is other.x


def _state(x):
    """What can be compared later, to tell whether something was changed."""
    if x is None or isinstance(x, (bool, int, float, str, bytes)):
        return type(x), x
    if isinstance(x, np.ndarray):
        return x.shape, x.dtype.str, x.tobytes()
    if isinstance(x, (list, tuple)):
        return type(x), [_state(y) for y in x]
    if isinstance(x, dict):
        return type(x), [(_state(k), _state(v)) for k, v in x.items()]
    if isinstance(x, Sampler):
        return _Identity(x), _state(vars(x))
    return _Identity(x)
