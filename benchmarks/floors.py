"""What no implementation can be faster than, measured on this machine.

    python -m benchmarks.floors torch PRESET BATCH

prints, as JSON, the seconds that the `products` of a decode step take: to
multiply a batch of vectors with every weight matrix, in float32, in that
framework (on PyTorch by MKL or by oneDNN, whichever is faster). `bandwidth()`
is how fast memory is read, and so how fast weights and a filled cache can be.
"""

import argparse
import functools
import json
import statistics
import time

import numpy as np

from benchmarks import kinds
from benchmarks.device import torch_device


def matrix_shapes(preset):
    """Shapes `(out, in)` of all matrices that a decode step multiplies by."""
    import transformers

    kind = kinds.of(preset)
    auto_class = getattr(transformers, kind.transformers_class)
    model = auto_class.from_pretrained(preset)
    return [
        # GPT-2 keeps its matrices the other way around, as `Conv1D`.
        tuple(x.weight.shape[::-1])
        if type(x).__name__ == "Conv1D"
        else tuple(x.weight.shape)
        for x in kind.only_in_steps(model.named_modules())
        if type(x).__name__ in ("Linear", "Conv1D")
    ]


def median_seconds(function, repetitions=7):
    seconds = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def bandwidth():
    """Bytes per second, all cores reading from memory."""
    import torch

    x = torch.ones(2**27, device=torch_device())
    return x.numel() * 4 / median_seconds(lambda: x.sum().item())


def products(backend, shapes, batch):
    """Seconds for one batch of vectors times every matrix."""
    rng = np.random.default_rng(0)
    sizes = sorted(set(shapes))
    matrices = [rng.normal(size=x).astype("float32") for x in shapes]
    vectors = {
        x: rng.normal(size=(batch, x)).astype("float32") for _, x in sizes
    }
    if backend == "torch":
        import torch

        from keras_nlp_cache.generate.loops.torch_products import dense_product

        device = torch_device()
        matrices = [torch.tensor(x.T, device=device) for x in matrices]
        vectors = {
            n: torch.tensor(x, device=device) for n, x in vectors.items()
        }

        def all_products(product):
            for x in matrices:
                last = product(vectors[x.shape[0]], x)
            last.cpu()  # A GPU has done all that came before, too.

        return min(
            median_seconds(functools.partial(all_products, product))
            for product in (torch.matmul, dense_product)
        )
    if backend == "jax":
        import jax

        matrices = [jax.numpy.asarray(x.T) for x in matrices]

        @jax.jit
        def multiply(matrices):
            return [vectors[x.shape[0]] @ x for x in matrices]

        return median_seconds(lambda: jax.block_until_ready(multiply(matrices)))
    import tensorflow as tf

    matrices = [tf.Variable(x.T) for x in matrices]

    @tf.function(jit_compile=True)
    def multiply():
        return [tf.constant(vectors[x.shape[0]]) @ x for x in matrices]

    return median_seconds(lambda: [x.numpy() for x in multiply()])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["jax", "tensorflow", "torch"])
    parser.add_argument("preset")
    parser.add_argument("batch", type=int)
    args = parser.parse_args()
    shapes = matrix_shapes(args.preset)
    print(json.dumps({"products": products(args.backend, shapes, args.batch)}))


if __name__ == "__main__":
    main()
