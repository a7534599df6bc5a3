"""Quantized weights, in a backbone that has a cache."""
