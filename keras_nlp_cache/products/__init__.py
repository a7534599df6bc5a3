"""Products of a few rows with a weight, by kernels of our own on a CPU.

A decode step is bound by the bytes of its weights, and no product that the
backends bring is fast at one row of small numbers. `kernels.py` has those that
are, compiled by numba, which needs no compiler on the machine. `jobs.py` shares
one among threads. They run inside of the compiled step: `xla_handler.py` is how
XLA calls them, `jax_product.py`, `tensorflow_product.py` and `torch_product.py`
how a backend does.

`choice.py` says where they are worth it. `finding.py` finds the weights of a
model, `packing.py` and `sources.py` keep them as kernels read them, and
`layers.py` is where a layer asks for its product.
"""

from keras_nlp_cache.products.choice import description

__all__ = ["description"]
