"""Products with some of many matrices, as one operator of PyTorch.

Which ones, are values, and what is captured of a decode step knows no values.
So the operator is captured as a whole, and looks when it runs.
"""

import torch

_LIBRARY = torch.library.Library("keras_nlp_cache", "FRAGMENT")
_LIBRARY.define(
    "expert_product(Tensor x, Tensor weights, Tensor experts, Tensor? count) "
    "-> Tensor"
)


def product(x, weights, chosen):
    """Multiplies with the weights of chosen experts, where they lie.

    Args:
        x: Tensor `(1 or n, T, K)`. For an expert that is there again, the same
            again.
        weights: Tensor `(num_experts, K, N)`.
        chosen: `mixture.Chosen`, with `n` experts.

    Returns:
        A tensor `(n, T, N)` of the dtype of `x`.
    """
    count = chosen.count if isinstance(chosen.count, torch.Tensor) else None
    return torch.ops.keras_nlp_cache.expert_product(
        x, weights, chosen.experts, count
    )


def _product(x, weights, experts, count):
    chosen = experts.tolist()
    output = x.new_empty((len(chosen), x.shape[1], weights.shape[2]))
    different = len(chosen) if count is None else int(count)
    for i, expert in enumerate(chosen[:different]):
        rows = x[i if x.shape[0] > 1 else 0]
        output[i] = torch.mm(rows, weights[expert].to(x.dtype))
    output[different:] = output[:1]
    return output


_LIBRARY.impl("expert_product", _product, "CompositeExplicitAutograd")


@torch.library.register_fake("keras_nlp_cache::expert_product", lib=_LIBRARY)
def _(x, weights, experts, count):
    return x.new_empty((experts.shape[0], x.shape[1], weights.shape[2]))
