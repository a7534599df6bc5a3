"""`keras-nlp-cache`."""
