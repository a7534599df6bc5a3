"""Steps on PyTorch that are recorded, as they are on a GPU."""

import sys

import keras
import numpy as np
import pytest
from keras_hub.samplers import TopKSampler

from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens

if keras.config.backend() != "torch":
    pytest.skip("records PyTorch operators", allow_module_level=True)

import torch
from torch.utils import _pytree as pytree

from keras_nlp_cache import device
from keras_nlp_cache.generate.loops import torch_loop
from keras_nlp_cache.generate.loops import torch_recording


@pytest.fixture
def recordings(monkeypatch):
    """Has steps recorded, also where there is no GPU. What they were."""
    found = []

    def record(function):
        found.append(function)
        if torch.cuda.is_available():
            return _record(function)
        first = function()
        output = pytree.tree_map_only(torch.Tensor, torch.clone, first)

        def replay():
            # The same memory each time, whatever else is done with it.
            for x, y in zip(
                pytree.tree_leaves(output), pytree.tree_leaves(function())
            ):
                x.copy_(y)
            return output

        return replay, first

    _record = torch_recording.record
    monkeypatch.setattr(torch_loop, "record", record)
    monkeypatch.setattr(torch_loop.TorchLoop, "records", True)
    return found


def task(name, sampler="greedy", reads_text=False, **kwargs):
    keras.utils.set_random_seed(0)
    family = next(x for x in FAMILIES if x.name == name)
    preprocessor, of_text = None, {}
    if reads_text:
        preprocessor = family.preprocessor()
        size = preprocessor.tokenizer.vocabulary_size()
        of_text = {"vocabulary_size": size}
    lm = family.task(family.backbone(**of_text), preprocessor)
    if sampler == "top_k":
        sampler = TopKSampler(seed=1)
    lm.compile(sampler=sampler, **kwargs)
    return lm


def prompts(lengths, max_length):
    mask = padding_mask(lengths, max_length)
    return {
        "token_ids": random_tokens(len(lengths), max_length) * mask,
        "padding_mask": mask,
    }


def generate(lm, lengths, total, stop_token_ids=None, **kwargs):
    output = lm.generate(
        prompts(lengths, total), stop_token_ids=stop_token_ids, **kwargs
    )
    return output["token_ids"]


# GPT-2 learned 64 positions, and has no slot beyond them.
@pytest.mark.parametrize("sampler", ["greedy", "top_k"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3_5", "rwkv7"])
def test_what_is_generated_stays_the_same(name, sampler, recordings):
    eager = task(name, sampler, run_eagerly=True)
    lm = task(name, sampler)
    for lengths, length in (([5, 3, 8], 20), ([5], 20), ([5], 20), ([60], 64)):
        expected = generate(eager, lengths, length)
        np.testing.assert_array_equal(generate(lm, lengths, length), expected)
        # It ends where a text does, and not a step later.
        stops = expected[:, [-4, -2]].flatten().tolist()
        np.testing.assert_array_equal(
            generate(lm, lengths, length, stops),
            generate(eager, lengths, length, stops),
        )
    assert recordings


def test_what_was_recorded_is_used_again(recordings):
    lm = task("llama")
    generate(lm, [5], 20)
    for lengths in ([5], [7], [3]):
        generate(lm, lengths, 30)
    # What reads a chunk, and what makes a step.
    assert len(recordings) == 2
    # In a cache of another size, and of several rows.
    generate(lm, [5], 300)
    assert len(recordings) == 4
    generate(lm, [5, 5], 300)
    generate(lm, [9, 9], 300)
    assert len(recordings) == 6
    # Rows of different lengths are read one by one.
    generate(lm, [5, 6], 300)
    generate(lm, [3, 9], 300)
    assert len(recordings) == 6
    # A state begins as zeros, in a cache of its own, and is read eagerly.
    del recordings[:]
    lm = task("qwen3_5")
    generate(lm, [5], 20)
    generate(lm, [5], 20)
    assert len(recordings) == 2


@pytest.mark.parametrize(
    "name, policy",
    [("llama", "full"), ("gemma3", "rotating"), ("mistral", "int8")],
)
def test_prompts_of_several_chunks(name, policy, recordings, monkeypatch):
    # Of 256 slots, the last 16 are no whole chunk.
    monkeypatch.setattr(device, "_chosen", {"compiled_chunk": 48})
    options = {"sampler": "greedy", "cache_policy": policy}
    lm, eager = task(name), task(name)
    lm.compile(**options)
    eager.compile(**options, run_eagerly=True)
    for lengths in ([250], [190], [33, 33], [64, 20]):
        total = max(lengths) + 6
        np.testing.assert_array_equal(
            generate(lm, lengths, total), generate(eager, lengths, total)
        )


def test_changed_models_are_seen(recordings):
    lm, eager = task("llama"), task("llama", run_eagerly=True)
    before = generate(lm, [5], 20)
    for model in (lm, eager):
        embedding = model.backbone.token_embedding.embeddings
        embedding.assign(keras.ops.flip(embedding, axis=0))
    after = generate(lm, [5], 20)
    assert (after != before).any()
    np.testing.assert_array_equal(after, generate(eager, [5], 20))
    options = {"min_p": 0.5, "return_logprobs": 2, "repetition_penalty": 3.0}
    for temperature in (0.2, 5.0):
        lm.sampler.temperature = eager.sampler.temperature = temperature
        actual, expected = (
            model.generate(
                prompts([5, 7], 20),
                max_length=20,
                stop_token_ids=None,
                **options,
            )
            for model in (lm, eager)
        )
        assert set(actual) == set(expected)
        for name, x in expected.items():
            np.testing.assert_allclose(actual[name], x, atol=1e-5)


def test_texts_in_turns(recordings):
    found = []
    for options in ({}, {"run_eagerly": True}):
        lm = task("llama", reads_text=True, **options)
        sessions = [lm.start_session(), lm.start_session()]
        streams = [
            session.stream_tokens(random_tokens(1, 4 + i)[0] % 50, 8)
            for i, session in enumerate(sessions)
        ]
        tokens = [token for pair in zip(*streams) for token in pair]
        for i, session in enumerate(sessions):
            tokens += session.stream_tokens(random_tokens(1, 3 - i)[0] % 50, 5)
        found.append(tokens)
    assert len(found[0]) == 2 * 8 + 2 * 5
    assert found[0] == found[1]
    assert recordings


def test_what_a_user_s_function_does_is_not_recorded(recordings):
    lm, eager = task("llama"), task("llama", run_eagerly=True)
    lengths = []

    def processor(token_ids, logits, lengths_now):
        lengths.append(int(lengths_now[0]))
        return -logits

    options = {"logits_processor": processor, "max_length": 20}
    np.testing.assert_array_equal(
        generate(lm, [5], 20, **options),
        generate(eager, [5], 20, **options),
    )
    assert lengths == 2 * list(range(5, 20))


def test_a_flag_is_looked_at_later():
    flag = torch.ones((), dtype=torch.bool)
    wait = torch_recording.look(flag)
    flag.zero_()
    assert wait() is True
    assert torch_recording.look(flag)() is False


@pytest.mark.parametrize(
    "loaded, expected",
    [(["tensorflow"], False), (["tensorflow", "triton"], True)],
)
def test_triton_is_not_imported_after_tensorflow(loaded, expected, monkeypatch):
    """That would end the process."""
    for name in ("tensorflow", "triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in loaded:
        monkeypatch.setitem(sys.modules, name, None)
    assert torch_loop._has_triton() is expected
