"""What is captured on PyTorch does what was captured, with fewer operators."""

import collections

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("captures PyTorch operators", allow_module_level=True)

import torch

from keras_nlp_cache.loops.torch_capture import capture
from keras_nlp_cache.loops.torch_capture import separate_views


def operators(module):
    return collections.Counter(
        str(node.target)
        for node in module.graph.nodes
        if node.op == "call_function"
    )


def test_what_repeats_is_computed_once():
    def tables(positions):
        frequencies = 10.0 ** -torch.arange(0, 4, dtype=torch.float32)
        return torch.cos(positions[:, None] * frequencies)

    def function(positions, x):
        for _ in range(5):
            x = x * tables(positions)
        return x

    args = torch.arange(3.0), torch.randn(3, 4)
    module = capture(function, *args)
    counts = operators(module)
    assert counts["aten.cos.default"] == 1
    assert not counts["aten.arange.start_step"] + counts["aten.pow.Scalar"]
    torch.testing.assert_close(module(*args), function(*args))


def test_what_changes_between_is_computed_again():
    def function(x):
        before = x.sum()
        x[0] += 1
        return before, x.sum()

    module = capture(function, torch.zeros(3))
    x = torch.zeros(3)
    before, after = module(x)
    assert (float(before), float(after), float(x[0])) == (0.0, 1.0, 1.0)


def test_random_numbers_stay_random():
    module = capture(
        lambda x: x + torch.rand(3) - torch.rand(3), torch.zeros(3)
    )
    x = torch.zeros(3)
    assert (module(x) != 0).any()
    assert (module(x) != module(x)).any()


def test_reshapes_merge_but_expansions_and_transpositions_stay():
    def function(x):
        x = x[None].reshape(4, 3).view(2, 2, 3).transpose(0, 2)
        return x.reshape(12), x.unsqueeze(0).expand(5, 3, 2, 2)

    x = torch.arange(12.0)
    module = capture(function, x)
    for actual, expected in zip(module(x), function(x)):
        np.testing.assert_array_equal(actual, expected)
    small = capture(lambda x: x.view(1, 1, 4).transpose(0, 1)[0], torch.ones(4))
    assert operators(small)["aten.transpose.int"] == 0


def test_views_of_weights_are_made_apart():
    def function(weights, x):
        w, v = weights
        return x @ w.view(3, 4) @ w.view(4, 3).t().t() + v

    weights, x = [torch.randn(12), torch.randn(3)], torch.randn(2, 3)
    module = capture(function, weights, x)
    prepare, module = separate_views(module, 2)
    views = prepare(*weights)
    torch.testing.assert_close(module(*views, x), function(weights, x))
    assert {"aten.mm.default", "aten.add.Tensor"} == set(operators(module))
    weights[0] *= 2
    torch.testing.assert_close(module(*views, x), function(weights, x))
