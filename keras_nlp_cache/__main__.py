"""`python -m keras_nlp_cache` is `keras-nlp-cache`."""

import sys

from keras_nlp_cache.command_line.cli import main

sys.exit(main())
