"""Which form of a product runs, and what that was measured to be worth."""

import keras

# Of any number of rows.
_ANY = 2**31
# Up to how many rows of `x` a kernel of our own is the fastest form, by what
# multiplies otherwise and by what is read, see `Form.kind`. Above, and where
# there is 0, what the backend has serves.
#
# Measured on 2 cores with AVX-512, for a weight of 768 x 3072: microseconds of
# processor time for 1, 8 and 32 rows, ours / the backend's. Since then ours
# take as little as half of it for several rows, see `float_sums.py`.
MOST_ROWS = {
    "xla": {
        # 556, 1266, 2490 / 482, 1064, 2196, from the processor's cache. From
        # memory, tokens per second of SmolLM2 in batches of 1, 4, 8 and 32:
        # 63, 144, 250, 481 / 41, 122, 205, 655.
        "float32": 8,
        # 303, 964, 2311 / 7000 for 1 row (on a processor with AVX2), for XLA
        # widens the whole matrix first.
        "bfloat16": 32,
        # Not measured: as bfloat16.
        "float16": 32,
        # 285, 603, 1926 / 4000 to 6000 for 1 row (on a processor with AVX2).
        "int8": 32,
        # XLA multiplies integers one by one, be there few rows or many.
        "int8_with_rounded": _ANY,
        # Not measured alone: the whole matrix is widened first.
        "int8_in_groups": 32,
        # Not measured alone: Keras unpacks the whole matrix first.
        "int4": 32,
    },
    "torch": {
        # 436, 1127, 2366 / 872, 1060, 2102, which is oneDNN's. Of SmolLM2 in
        # batches of 8: 188 tokens per second / 166.
        "float32": 8,
        # 198, 855, 2197 / 572, 694, 1228; 536 and 2364 for 1 and 8 rows where
        # a processor has no products of bfloat16. Of SmolLM2 in batches of 16:
        # 155 tokens per second / 307.
        "bfloat16": 8,
        # Not measured.
        "float16": 8,
        # 237, 540, 1857 / more than those of float32, which it is widened to
        "int8": 32,
        # So does PyTorch: 200 tokens of SmolLM2 took 28 seconds.
        "int8_with_rounded": _ANY,
        # Not measured alone: the whole matrix is widened first.
        "int8_in_groups": 32,
        # Not measured alone: Keras unpacks the whole matrix first.
        "int4": 32,
    },
}


def most_rows(kind):
    """Up to how many rows of `x` our kernels serve on this backend.

    Args:
        kind: str. What is read, such as `"int8"`, see `Form.kind`.
    """
    library = "torch" if keras.config.backend() == "torch" else "xla"
    return MOST_ROWS[library][kind]
