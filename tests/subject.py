"""What the tests speak of."""

import os

# The same tests speak of the package and of keras_hub as `patches/` patch it,
# where the package is not even installed.
PATCHED = os.environ.get("KERAS_NLP_CACHE_SUBJECT") == "patched"


def backend():
    """The name of the backend, for whoever need not import Keras to know."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    import keras

    return keras.config.backend()
