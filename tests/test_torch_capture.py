"""What is captured on PyTorch does what was captured, with fewer operators."""

import collections
import contextlib

import keras
import numpy as np
import pytest

if keras.config.backend() != "torch":
    pytest.skip("captures PyTorch operators", allow_module_level=True)

import torch
from torch.utils import _pytree as pytree

from keras_nlp_cache.cache.access import Access
from keras_nlp_cache.generate.loops import torch_loop
from keras_nlp_cache.generate.loops.access import TorchAccess
from keras_nlp_cache.generate.loops.alike import describe
from keras_nlp_cache.generate.loops.torch_capture import capture
from keras_nlp_cache.generate.loops.torch_capture import separate_views
from keras_nlp_cache.generate.loops.torch_copies import _Traced
from keras_nlp_cache.generate.loops.torch_copies import Copied
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import random_tokens
from tests.families import to_numpy


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


def test_what_is_filled_anew_each_time_is_no_constant():
    def function(x):
        outputs = torch.zeros(3, 2)
        for i in range(3):
            outputs[i : i + 1] = x[i : i + 1] + i
        return outputs

    module = capture(function, torch.zeros(3, 2))
    for x in (torch.ones(3, 2), torch.arange(6.0).reshape(3, 2)):
        torch.testing.assert_close(module(x), function(x))


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


def calls_of(function, *args):
    """What a function put into a graph, and how it was called."""
    counts = []

    def counted(*args):
        counts.append(args)
        return function(*args)

    return Copied(counted), counts


def test_copies_are_what_would_be_traced():
    closed_over = torch.tensor([1.0, 2.0])

    def block(weights, x, kept):
        kept[1:] += x
        return (x * weights).cos() + closed_over, kept

    def function(repeated):
        def run(weights, x, kept):
            for w, k in zip(weights, kept):
                x, written = repeated(w, x, k)
                x = x + written.sum()
            return x, kept

        return run

    def args():
        kept = [torch.zeros(3, 2) for _ in range(4)]
        return list(torch.arange(8.0).reshape(4, 2)), torch.ones(1, 2), kept

    copied, counts = calls_of(block)
    module = capture(function(copied), *args())
    assert len(counts) == 1
    expected = capture(function(block), *args())
    assert graph_of(module) == graph_of(expected)
    flat = pytree.tree_leaves(args())
    found = module(*flat)
    (x, kept), own = function(block)(*args()), flat[5:]
    for actual, wanted in zip((found[0], *own), (x, *kept), strict=True):
        torch.testing.assert_close(actual, wanted)


def graph_of(module):
    """What a captured function does, whatever its nodes are called."""
    numbers, told = {}, []
    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        arguments = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda x: f"node {numbers[x]}"
        )
        value = node.meta.get("val") if node.op != "output" else None
        told.append(
            (
                node.op,
                "" if node.op == "placeholder" else str(node.target),
                str(arguments),
                getattr(value, "shape", None),
                getattr(value, "dtype", None),
            )
        )
    return told


def test_what_is_not_the_same_is_traced_again():
    def returns_a_view(x, y):
        return x[:1] * 1, y[:1]

    def adds(x, y):
        return x + y

    x, y, z = torch.ones(2), torch.arange(2.0), torch.full((2,), 3.0)
    for function, calls, count in (
        (returns_a_view, [(x, y), (y, z)], 2),
        (adds, [(x, y), (z, y), (y, y), (z, x)], 2),
        (adds, [(x, x), (x, y), (y, y)], 2),
    ):
        copied, counts = calls_of(function)

        def run(*leaves, calls=calls, function=copied):
            given = dict(zip(map(id, (x, y, z)), leaves))
            return [function(*(given[id(a)] for a in c)) for c in calls]

        module = capture(run, x, y, z)
        assert len(counts) == count, function
        torch.testing.assert_close(
            pytree.tree_leaves(module(x, y, z)),
            pytree.tree_leaves([function(*c) for c in calls]),
        )

    def run(x, y, kept):
        def writes_elsewhere(x, y):
            kept.add_(1)
            return x + y

        copied, found = calls_of(writes_elsewhere)
        returned = copied(copied(x, y), y)
        counts.append(len(found))
        return returned

    module = capture(run, x, y, z)
    assert counts[-1] == 2
    torch.testing.assert_close(module(x, y, z), x + y + y)
    assert z.tolist() == [5.0, 5.0]
    # With nothing that captures, it is called.
    copied, counts = calls_of(adds)
    assert copied(x, y).tolist() == [1.0, 2.0] and len(counts) == 1


@deep_families
def test_a_step_with_copies_of_blocks_is_what_all_of_them_do(
    family, monkeypatch
):
    found, copied = [], []
    own, copy = TorchAccess.call_block, _Traced.copied_for
    monkeypatch.setattr(
        _Traced, "copied_for", lambda *x: (copied.append(x), copy(*x))[1]
    )
    captured = torch_loop.capture

    def kept(*args):
        found.append(captured(*args))
        return found[-1]

    monkeypatch.setattr(torch_loop, "capture", kept)
    prompt = {"token_ids": np.array([[3, 4, 5, 0, 0]])}
    prompt["padding_mask"] = prompt["token_ids"] > 0
    for call_block in (own, Access.call_block):
        lm = family.task(family.backbone(), None)
        lm.compile(sampler="greedy")
        monkeypatch.setattr(TorchAccess, "call_block", call_block)
        lm.generate(prompt, stop_token_ids=None)
    with_copies, without = map(graph_of, found)
    assert with_copies == without
    alike = {repr(describe(x)[1]) for x in lm.backbone.blocks}
    assert len(copied) == len(lm.backbone.blocks) - len(alike)


# What a user may switch on, and what it is to be seen by.
SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "a default dtype": lambda: default_dtype(torch.float64),
    "deterministic": lambda: deterministic(),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "a precision": lambda: precision("medium"),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keys(lm):
    """What is in the cache after some steps of a decode loop."""
    prompt, loop = random_tokens(1, 5), lm.generation_loop
    generation = loop.prefill(prompt, np.ones_like(prompt), 64)
    generation = loop.decode(generation, 12)
    return to_numpy(generation.cache[-1][0])[:, :, :11]


@pytest.mark.parametrize("family", FAMILIES[1:4:2], ids=["gemma", "llama"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_seen_while_they_last(family, name):
    """Whichever comes first, each is as in a model that knows no other."""
    lm = family.lm_pair[0]

    def fresh(setting, **kwargs):
        lm.compile(sampler="greedy", **kwargs)
        with setting():
            return keys(lm)

    plain = fresh(contextlib.nullcontext)
    changed = fresh(SETTINGS[name])
    np.testing.assert_array_equal(keys(lm), plain)
    with SETTINGS[name]():
        np.testing.assert_array_equal(keys(lm), changed)
    # It is what the layers do when they are called.
    eager = fresh(SETTINGS[name], run_eagerly=True)
    if "autocast" in name:
        assert np.abs(changed - plain).max() > 1e-4
    if "autocast" in name or "precision" in name:
        # A processor that multiplies in bfloat16 does so by either way.
        # Before the first token that may be another one after rounding.
        changed, eager = changed[:, :, :5], eager[:, :, :5]
        scale = np.abs(eager).max()
        np.testing.assert_allclose(changed, eager, atol=0.05 * scale)
    else:
        np.testing.assert_allclose(changed, eager, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_between_two_tokens(name):
    lm = FAMILIES[3].lm_pair[0]
    lm.compile(sampler="greedy")
    prompt, loop = random_tokens(1, 5), lm.generation_loop

    def steps(*settings):
        generation = loop.prefill(prompt, np.ones_like(prompt), 64)
        steps = loop.steps(generation, 12)
        for setting in settings:
            with setting():
                generation = next(steps)
        return to_numpy(generation.cache[-1][0])[0, :, 4:7]

    plain, setting = contextlib.nullcontext, SETTINGS[name]
    # One slot for each step, as if it had been the same before.
    one, other, both = (
        steps(*x)
        for x in (
            (plain, plain, plain),
            (plain, setting, setting),
            (plain, setting, plain),
        )
    )
    np.testing.assert_array_equal(both[:, 0], one[:, 0])
    np.testing.assert_array_equal(both[:, 1], other[:, 1])
    if "autocast" in name:
        assert (one[:, 1] != other[:, 1]).any()


def test_a_session_goes_on_in_another_mode():
    lm = FAMILIES[0].text_lm()
    expected, session = (lm.start_session() for _ in range(2))
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode):
        expected.send("the", 3, None)
        with mode():
            session.send("the", 3, None)
    stream = session.stream("the", 3, None)
    with torch.inference_mode():
        next(stream)
    list(stream)
    expected.send("the", 3, None)
    np.testing.assert_array_equal(session.token_ids, expected.token_ids)
