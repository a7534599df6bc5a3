"""How the blocks of a model are traced, by what reads their weights."""

from keras_nlp_cache.generate.loops import alike
from keras_nlp_cache.products.multiplying import known_of
from keras_nlp_cache.products.multiplying import multiplying_as_known


class _Packed(alike.Carried):
    """What kernels of our own read of variables."""

    def of(self, variables):
        return known_of(variables)

    def as_of(self, variables, known):
        return multiplying_as_known(variables, known)


def tracing_once():
    """A scope in which blocks of a model that are alike are traced once."""
    return alike.tracing_once([_Packed()])
