"""Models whose weights are to be read from a file next."""

import keras

from keras_nlp_cache.memory import untouched_zeros

_RANDOM = (
    keras.initializers.RandomNormal,
    keras.initializers.RandomUniform,
    keras.initializers.TruncatedNormal,
    keras.initializers.VarianceScaling,
)


def without_random_numbers(cls, *args, **kwargs):
    """Constructs a model, with zeros where it would draw random numbers.

    These cost more than the numbers that take their place: of 135M weights on
    2 cores 2.5 s, and on JAX a compilation for each of their shapes.

    Args:
        cls: A class of `keras.Model`, built by its constructor.
        *args: Passed on to it.
        **kwargs: Passed on to it.
    """
    if keras.distribution.distribution() is not None:
        # Each device is to draw its share.
        return cls(*args, **kwargs)
    try:
        # Variables that are made in such a scope get their values at its end.
        with keras.StatelessScope():
            model = cls(*args, **kwargs)
            draw_no_random_numbers(model)
    except ValueError as e:
        if "stateless scope" not in str(e):
            raise
        # Something is made of a value, and not of an initializer.
        return cls(*args, **kwargs)
    return model


def draw_no_random_numbers(model):
    """Has a model begin with zeros, which is made in a `StatelessScope`.

    Args:
        model: A `keras.Model`, whose variables have no values yet.
    """
    for variable in model.variables:
        if isinstance(variable._initializer, _RANDOM):
            variable._initializer = untouched_zeros
