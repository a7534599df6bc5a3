"""Code of our own on a CPU, compiled by numba, which needs no compiler.

A *kernel* computes some of a job's pieces. `jobs.py` shares a job among
threads. Jobs run inside of the compiled step: `xla_handler.py` is how XLA calls
them, `jax_call.py`, `tensorflow_call.py` and `torch_call.py` how a backend
does. PyTorch lends no threads: `own_threads.py` has some, and
`torch_threads.py` keeps its own from their cores.

A kernel reads and writes floats of 32 and of 16 bits, `floats.py`, and computes
in float32.
"""

from keras_nlp_cache.kernels.availability import description

__all__ = ["description"]
