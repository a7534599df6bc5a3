"""`python -m keras_nlp_cache` is `keras-nlp-cache`."""

import sys

from keras_nlp_cache.cli import main

sys.exit(main())
