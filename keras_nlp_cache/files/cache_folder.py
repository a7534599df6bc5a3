"""Where the package keeps what it can make again."""

import os
import pathlib

import platformdirs


def cache_folder():
    """`KERAS_NLP_CACHE_HOME` if that is set, else the user's cache folder."""
    home = os.environ.get("KERAS_NLP_CACHE_HOME")
    return pathlib.Path(home or platformdirs.user_cache_dir("keras-nlp-cache"))
