"""Caches that are done with, for what is generated next."""

import keras
from keras import tree


class SpareCaches(dict):
    """The last cache of one row, at `True`, and of several, at `False`."""

    def put(self, cache):
        """Takes a cache that is not to be used any more.

        Returns:
            The one in whose place it is, or `None`.
        """
        one_row = tree.flatten(cache)[0].shape[0] == 1
        before, self[one_row] = self.get(one_row), cache
        return None if before is cache else before

    def take(self, batch, make_cache):
        """A cache to write over, with anything in it.

        Args:
            batch: int. How many rows it is to have.
            make_cache: Function that makes one, from the keyword argument
                `zeros`, a function from a shape and a dtype to a tensor.

        Returns:
            A tuple `(cache, rest)`: one that was here, or `None`, and one that
            was here and was of another size, or `None`.
        """
        spare = self.pop(batch == 1, None)
        if spare is None:
            return None, None
        if _shapes(spare) == _shapes(make_cache(zeros=keras.KerasTensor)):
            return spare, None
        return None, spare


def _shapes(cache):
    return [
        (tuple(x.shape), keras.backend.standardize_dtype(x.dtype))
        for x in tree.flatten(cache)
    ]
