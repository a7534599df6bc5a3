"""Operators of a captured step that a kernel stands for."""

import importlib.util

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("captures steps of PyTorch", allow_module_level=True)
if importlib.util.find_spec("numba") is None:
    pytest.skip("needs numba", allow_module_level=True)

import torch

from keras_nlp_cache.generate.loops import torch_step_kernels
from keras_nlp_cache.generate.loops.torch_capture import capture
from keras_nlp_cache.generate.loops.torch_fusing import fuse
from keras_nlp_cache.kernels.torch_call import OPERATOR


def random(*shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.to(dtype)


def normalized(x, exponent=2.0, epsilon=1e-6):
    exponent = torch.tensor(exponent, device=x.device)
    mean = torch.mean(torch.pow(x, exponent), dim=-1, keepdim=True)
    return x * torch.rsqrt(mean + epsilon)


def turned(x):
    first, second = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.stack([-second, first], dim=-2).reshape(x.shape)


def rotated(x, angle):
    return x * torch.cos(angle) + turned(x) * torch.sin(angle)


@pytest.fixture(params=["numba", "triton"])
def check(request):
    """Checks that what is computed stays the same, with kernels in it."""
    if request.param == "numba":
        return _check_on_cpu
    pytest.importorskip(
        "triton", reason="no Triton, which ends a process with TensorFlow"
    )
    return _check_with_triton


def _check_on_cpu(function, *args, kernels):
    module = capture(function, *args)
    fuse(module, torch_step_kernels.kernel_of)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(OPERATOR) == kernels
    torch.testing.assert_close(module(*args), function(*args))


def _check_with_triton(function, *args, kernels):
    from keras_nlp_cache.generate.loops import triton_step_kernels

    on_gpu, found = torch.cuda.is_available(), []
    args = [x.cuda() if on_gpu else x for x in args]

    def kernel_of(fused):
        kernel = triton_step_kernels.kernel_of(fused)
        found.append(kernel and kernel[0])
        # A sum is one operator of PyTorch anyway.
        assert (kernel is None) == (fused.kind == "add")
        return kernel

    module = capture(function, *args)
    fuse(module, kernel_of)
    assert len(found) == kernels
    targets = {node.target for node in module.graph.nodes}
    assert {x for x in found if x} <= targets
    actual, expected = module(*args), function(*args)
    tolerance = {}
    if expected.dtype == torch.bfloat16 and not on_gpu:
        # Triton's interpreter cuts bits off where a GPU rounds.
        tolerance = {"rtol": 0.02, "atol": 0.03}
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 2, 33), (5, 64)])
def test_a_norm_is_one_kernel(check, shape):
    check(normalized, random(*shape), kernels=1)
    check(
        lambda x: torch.rsqrt(torch.mean(x.pow(2), -1, True) + 0.1) * x,
        random(*shape),
        kernels=1,
    )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("weight_dtype", DTYPES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_with_a_weight_is_one_kernel(check, dtype, weight_dtype):
    x = random(3, 1, 65, dtype=dtype)
    weight = random(65, dtype=weight_dtype)

    def call(x, weight):
        y = normalized(x.to(torch.float32)) * weight.to(torch.float32)
        return y.to(dtype)

    check(call, x, weight, kernels=1)
    check(lambda x, w: (normalized(x.float()) * w).sum(), x, weight, kernels=1)
    # Another weight for each row, or what is needed as it was.
    check(lambda x: normalized(x.float()) * torch.ones_like(x), x, kernels=1)
    check(
        lambda x, w: (lambda y: y * w - y)(normalized(x.float())),
        x,
        weight,
        kernels=1,
    )


def test_what_is_rounded_is_not_what_it_was_rounded_from(check):
    x, weight = random(3, 1, 65), random(65)
    check(
        lambda x, w: normalized(x) * w.to(torch.bfloat16), x, weight, kernels=1
    )
    check(lambda x: normalized(x.to(torch.bfloat16).float()), x * 30, kernels=1)
    silu = torch.nn.functional.silu
    check(lambda x, y: y * silu(x.to(torch.bfloat16)).float(), x, x, kernels=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_one_kernel(check, dtype):
    x = random(2, 3, 33, dtype=dtype)
    for other in (x * 2, x[0, 0], x[:1, :1], x[1, :1]):
        check(torch.add, x, other, kernels=1)
        check(torch.add, other, x, kernels=1)
    for other in (x[:, :1], x[0], x.double(), x[..., :1]):
        check(torch.add, x, other, kernels=0)
    check(lambda x, y: torch.add(x, y, alpha=2), x, x, kernels=0)
    check(lambda x: x + 1, x, kernels=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_one_kernel(check, dtype):
    x, y = random(2, 1, 33, dtype=dtype) * 20, random(2, 1, 33, dtype=dtype)

    def call(x, y):
        return y * torch.nn.functional.silu(x.to(torch.float32)).to(dtype)

    check(call, x, y, kernels=1)
    silu = torch.nn.functional.silu
    check(lambda x, y: silu(x) * y[:1], x, y, kernels=0)


@pytest.mark.parametrize(
    "x, angle",
    [
        ((1, 1, 9, 64), (1, 1, 1, 64)),
        ((3, 1, 4, 8), (3, 1, 1, 8)),
        ((2, 3, 4, 8), (2, 3, 1, 8)),
        ((2, 1, 4, 8), (1, 1, 1, 8)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_is_one_kernel(check, x, angle, dtype):
    x, angle = random(*x, dtype=dtype), random(*angle, dtype=dtype)
    check(rotated, x, angle, kernels=1)


def test_what_only_looks_alike_is_left_alone(check):
    x, angle = random(2, 3, 4, 8), random(2, 3, 1, 8)
    mean = random(2, 3, 4, 1).abs()
    check(lambda x: normalized(x, exponent=4.0), x, kernels=0)
    check(lambda x: normalized(x.double()), x, kernels=0)
    # Of something else than itself, or of other numbers.
    check(lambda x, mean: x * torch.rsqrt(mean + 1e-6), x, mean, kernels=0)
    check(
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-6), x, kernels=0
    )
    check(
        lambda x, a: x * torch.cos(a) - turned(x) * torch.sin(a),
        x,
        angle,
        kernels=0,
    )
    # But for their sums.
    check(
        lambda x, a: x * torch.cos(a) + turned(2 * x) * torch.sin(a),
        x,
        angle,
        kernels=1,
    )
    # Angles for each head, and tokens that stand at the same place.
    check(rotated, x, random(2, 3, 4, 8), kernels=1)
    check(rotated, x, random(1, 3, 1, 8), kernels=1)
