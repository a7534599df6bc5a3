"""Dense layers on PyTorch are one product each, of the same result."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("tests PyTorch's matrix products", allow_module_level=True)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keras_nlp_cache.generate.loops.torch_products import DenseProducts


class Operators(TorchDispatchMode):
    """Collects the names of the products that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(x in name for x in ("mm", "mv", "linear", "mul.")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def check(function, *operands, expect_one=None):
    expected = function(*operands)
    with torch.no_grad(), DenseProducts(), Operators() as operators:
        actual = function(*operands)
    torch.testing.assert_close(actual, expected)
    if expect_one is not None:
        (name,) = operators.names
        assert expect_one in name


float32 = "linear_pointwise" if torch.backends.mkldnn.is_available() else "mm"


@pytest.mark.parametrize(
    "equation, x, kernel",
    [
        ("bqm,muh->bquh", (2, 1, 6), (6, 3, 4)),
        ("bquh,uhm->bqm", (2, 3, 3, 4), (3, 4, 6)),
        ("btd,df->btf", (1, 1, 6), (6, 5)),
        ("btd,ndh->btnh", (2, 3, 6), (1, 6, 5)),
    ],
)
def test_dense_einsums_are_one_product(equation, x, kernel):
    operands = torch.randn(x), torch.randn(kernel)
    check(lambda *x: torch.einsum(equation, *x), *operands, expect_one=float32)


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,kj->ik", [(2, 3), (4, 3)]),
        ("ij->ji", [(2, 3)]),
        ("bi,j->bij", [(2, 3), (4,)]),
        ("bi,ij", [(2, 3), (3, 4)]),
        ("...d,df->...f", [(2, 3), (3, 4)]),
        ("btd,ndh->btnh", [(2, 3, 6), (2, 6, 5)]),
        ("btd,dnh->bnth", [(2, 3, 6), (6, 2, 5)]),
    ],
)
def test_other_einsums_are_left_alone(equation, shapes):
    check(lambda *x: torch.einsum(equation, *x), *map(torch.randn, shapes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(1, 6), (2, 1, 6), (5, 4, 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul(dtype, shape, transposed):
    dtype = getattr(torch, dtype)
    x = torch.randn(shape, dtype=dtype)
    matrix = torch.randn((6, 5), dtype=dtype)
    if transposed:
        matrix = matrix.t().contiguous().t()
    name = float32 if dtype == torch.float32 else "mm"
    for function in (torch.matmul, lambda x, y: x @ y, torch.Tensor.matmul):
        check(function, x, matrix, expect_one=name)


def test_vectors_batches_and_strides_are_right_too():
    check(torch.matmul, torch.randn(6), torch.randn(6, 5))
    check(torch.matmul, torch.randn(2, 3, 6), torch.randn(2, 6, 5))
    check(torch.matmul, torch.randn(6, 3).t(), torch.randn(6, 5))
    check(torch.matmul, torch.randn(2, 3, 12)[..., ::2], torch.randn(6, 5))
    check(torch.matmul, torch.randn(0, 6), torch.randn(6, 5))
