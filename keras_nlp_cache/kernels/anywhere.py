"""Where numba looks for what it compiled, wherever this package lies."""

import pathlib

from numba.core.caching import UserProvidedCacheLocator


class AnywhereLocator(UserProvidedCacheLocator):
    """Finds code by its folder's name alone, in a folder for what it says.

    numba's own also asks for the path of the file, so that each checkout and
    each environment would compile for itself.
    """

    @classmethod
    def get_suitable_cache_subpath(cls, py_file):
        return pathlib.Path(py_file).parent.name
