"""Products of a few rows with a weight, by kernels of our own on a CPU.

A decode step is bound by the bytes of its weights, and no product that the
backends bring is fast at one row of small numbers. `kernels.py` has those that
are: they round inputs and scale results, too. `operands.py` is how they read
and write. `float_sums.py`, `integer_sums.py` and, where groups have scales,
`group_sums.py` are how they sum, in vectors of a processor (`vectors.py`).

`choice.py` says where they are worth it. `finding.py` finds the weights of a
model, `packing.py` and `sources.py` keep them as kernels read them, and
`layers.py` is where a layer asks for its product.
"""
