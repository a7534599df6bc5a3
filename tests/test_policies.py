"""What policies of a cache keep, and what generation makes of it."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

from keras_nlp_cache import models
from keras_nlp_cache import surgery
from keras_nlp_cache.cache.policies import Full
from keras_nlp_cache.cache.policies import Rotating
from keras_nlp_cache.cache.policies import SinksAndWindow
from tests import prose
from tests.families import assert_greedy
from tests.families import compiled
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import in_words
from tests.families import on_one_backend
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import XLA

NAMED = {x.name: x for x in FAMILIES}
WITH_WINDOWS = ("gemma2", "mistral", "mixtral", "gpt_oss", "gemma3", "gemma4")
SINKS = SinksAndWindow(sinks=2, window=6)


@pytest.fixture
def few_places(monkeypatch):
    """As small models have small windows."""
    monkeypatch.setattr("keras_nlp_cache.cache.policies.rotating.SPARE", 16)


def bytes_of(backbone, max_length, **kwargs):
    """How large a cache would be, of each pair."""
    cache = backbone.make_cache(
        1, max_length, zeros=keras.KerasTensor, **kwargs
    )
    size = {"int8": 1, "int32": 4, "float32": 4}
    return [
        sum(int(np.prod(x.shape)) * size[x.dtype] for x in tree.flatten(pair))
        for pair in cache
    ]


@on_one_backend("shapes are counted")
@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_windows_bound_memory(name):
    backbone, _ = NAMED[name].pair
    full = bytes_of(backbone, 32768)
    rotating = bytes_of(backbone, 32768, policy="rotating")
    assert any(backbone.cache_windows)
    for window, one, other in zip(backbone.cache_windows, full, rotating):
        if window is None:
            assert one == other
        else:
            assert other * 32768 == one * (window + 128)
    # With a text of any length.
    longer = bytes_of(backbone, 131072, policy="rotating")
    for window, one, other in zip(backbone.cache_windows, rotating, longer):
        assert other == one or window is None


@on_one_backend("shapes are counted")
def test_eight_bits_take_a_quarter():
    backbone = models.GPT2Backbone(
        vocabulary_size=100,
        num_layers=2,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=64,
        max_sequence_length=512,
    )
    full, int8 = (
        sum(bytes_of(backbone, 512, policy=x)) for x in ("full", "int8")
    )
    assert int8 / full < 0.27


@deep_families
def test_eight_bits_are_close(family):
    """Hidden states are off by a hundredth of their size or less."""
    backbone, _ = family.pair
    token_ids = random_tokens(2, 24)
    outputs = []
    for policy in ("full", "int8"):
        cache = backbone.make_cache(2, 24, policy=policy)
        call, states = compiled(backbone), []
        for at in (0, 8, 16):
            x, cache = call(
                {
                    "token_ids": token_ids[:, at : at + 8],
                    "cache": cache,
                    "cache_update_index": at,
                }
            )
            states.append(to_numpy(x))
        outputs.append(np.concatenate(states, axis=1))
    full, int8 = outputs
    error = np.linalg.norm(int8 - full, axis=-1) / np.linalg.norm(full, axis=-1)
    assert 0 < error.mean() < 0.01 and error.max() < 0.03


def test_sinks_seem_near():
    """One block sees the first tokens right before the last ones.

    What it says of the last token of a long text is what it says of a text of
    the tokens that are kept.
    """
    backbone = NAMED["llama"].backbone(num_layers=1)
    call, token_ids = compiled(backbone), random_tokens(2, 250)
    cache = backbone.make_cache(2, 4096, policy=SINKS)
    index = 0
    for size in (1, 40, 3, *[1] * 5, 150, 1, 1, 40, 7, 2):
        inputs = {"cache": cache, "cache_update_index": index}
        now = token_ids[:, index : index + size]
        x, cache = call({"token_ids": now, **inputs})
        index += size
        if index <= 8:
            kept = token_ids[:, :index]
        else:
            kept = np.concatenate(
                [token_ids[:, :2], token_ids[:, index - 6 : index]], axis=1
            )
        np.testing.assert_allclose(
            to_numpy(x)[:, -1],
            to_numpy(call({"token_ids": kept}))[:, -1],
            atol=2e-5,
            rtol=2e-5,
        )
    assert index == 250


@pytest.mark.usefixtures("few_places")
@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_text_longer_than_the_places(name):
    family = NAMED[name]
    lm = family.task(family.backbone())
    prompts = [random_tokens(1, n)[0] for n in (50, 3)]
    lm.compile(sampler="greedy", cache_policy="rotating", **XLA)
    answers = lm.generate(
        [{"prompt": x, "max_new_tokens": 40} for x in prompts],
        batch_size=2,
        stop_token_ids=None,
    )
    for prompt, answer in zip(prompts, answers):
        assert_greedy(lm, np.asarray(answer)[None], len(prompt))
    # Guesses that turn out wrong take no place that is needed.
    draft = surgery.remove(lm, 1)
    draft.compile(sampler="greedy", cache_policy="rotating", **XLA)
    again = lm.generate(
        [{"prompt": x, "max_new_tokens": 40} for x in prompts],
        assistant_model=draft,
        stop_token_ids=None,
    )
    for a, b in zip(answers, again):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="at most 7 .* Received: 8"):
        lm.generate(
            prompts,
            max_new_tokens=40,
            prompt_lookup_num_tokens=8,
            stop_token_ids=None,
        )


POLICIES = {"rotating": Rotating(), "int8": Full("int8"), "sinks": SINKS}


def text_lm(name, policy):
    family = NAMED[name]
    lm = family.text_lm()
    lm.compile(sampler="greedy", cache_policy=policy, **XLA)
    return lm


@pytest.mark.usefixtures("few_places")
@pytest.mark.parametrize("policy", POLICIES)
def test_sessions(policy, tmp_path):
    """Kept in files, forked, and longer than the cache was at first."""
    lm = text_lm("gemma2", POLICIES[policy])
    session = lm.start_session()
    session.send("the fox", max_new_tokens=40, stop_token_ids=None)
    session.save(tmp_path / "a.safetensors")
    loaded = lm.start_session(tmp_path / "a.safetensors")
    forked = session.fork()
    answers = [
        x.send("and the dog", max_new_tokens=230, stop_token_ids=None)
        for x in (session, loaded, forked)
    ]
    assert answers[0] == answers[1] == answers[2]
    if policy == "rotating":
        end = len(session.token_ids)
        assert_greedy(lm, session.token_ids[None], end - 230)


@pytest.mark.usefixtures("few_places")
def test_going_back():
    lm = text_lm("gemma2", "rotating")
    session = lm.start_session()
    session.send("the fox", max_new_tokens=60, stop_token_ids=None)
    told = session.token_ids.copy()
    with pytest.raises(ValueError, match="later tokens took their places"):
        session.rewind(20)
    np.testing.assert_array_equal(session.token_ids, told)
    session.rewind(6)
    session.send("x", max_new_tokens=2, stop_token_ids=None)
    # What was written before counts, too.
    with pytest.raises(ValueError, match="Rewind less than 8 tokens"):
        session.rewind(8)
    assert_greedy(lm, session.token_ids[None], len(session.token_ids) - 2)


@pytest.mark.usefixtures("few_places")
def test_files_of_another_policy(tmp_path):
    path = tmp_path / "talk.safetensors"
    full, rotating, int8 = (
        text_lm("gemma2", x) for x in ("full", "rotating", "int8")
    )
    session = full.start_session()
    session.send("the fox", max_new_tokens=60, stop_token_ids=None)
    session.save(path)
    # One that keeps less finds all that it keeps.
    other = rotating.start_session(path)
    expected = session.send("and", max_new_tokens=9, stop_token_ids=None)
    assert other.send("and", max_new_tokens=9, stop_token_ids=None) == expected
    with pytest.raises(ValueError, match="cache policy .*int8"):
        int8.start_session(path)
    other.save(path)
    with pytest.raises(ValueError, match="cache policy Full"):
        full.start_session(path)


@in_words
def test_eight_bits_and_perplexity(smollm2):
    lm = models.CausalLM.from_preset(smollm2)
    tokenizer, text = lm.preprocessor.tokenizer, prose.TEXT
    token_ids = np.asarray(tokenizer(text))[None]
    assert token_ids.shape[1] > 150
    losses = {}
    for policy in ("full", "int8"):
        cache = lm.backbone.make_cache(1, token_ids.shape[1], policy=policy)
        logits, _, _ = lm.call_with_cache(token_ids, cache, 0)
        logprobs = to_numpy(ops.log_softmax(logits[0, :-1], axis=-1))
        losses[policy] = -np.mean(
            np.take_along_axis(logprobs, token_ids[0, 1:, None], axis=1)
        )
    change = np.exp(losses["int8"] - losses["full"]) - 1
    assert 0 < abs(change) < 0.01


MISTAKES = {
    "a name": (lambda b: b.make_cache(1, 8, policy="window"), "'window'"),
    "a storage": (lambda b: Rotating("int4"), "`storage`.*'int4'"),
    "no sinks": (lambda b: SinksAndWindow(sinks=0), "`sinks`.*Received: 0"),
    "a window": (lambda b: SinksAndWindow(window=2.5), "`window`.*2.5"),
    "learned positions": (
        lambda b: NAMED["gpt2"].pair[0].make_cache(1, 8, policy=SINKS),
        "rotary positions.*64 positions",
    ),
    "when it is compiled": (
        lambda b: NAMED["gpt2"].lm_pair[0].compile(cache_policy=SINKS),
        "rotary positions",
    ),
}


@on_one_backend("mistakes are found before anything is computed")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    function, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        function(NAMED["llama"].pair[0])


@in_turn("policy", ["int8", "rotating", "full"])
def test_masks_and_positions(family, policy):
    """A row that is padded on the left is as if it were not padded."""
    backbone, _ = family.pair
    token_ids = random_tokens(2, 30)
    mask = np.ones((2, 30), "int32")
    mask[1, :5] = 0
    positions = np.cumsum(mask, axis=1) - mask
    padded = np.where(mask, np.roll(token_ids, 5, axis=1), 0)
    padded[0] = token_ids[0]
    states = []
    for tokens, extra in (
        (token_ids, {}),
        (padded, {"padding_mask": mask, "token_positions": positions}),
    ):
        cache = backbone.make_cache(2, 30, policy=policy)
        outputs, call = [], compiled(backbone)
        for now in (slice(0, 20), slice(20, 21), slice(21, 30)):
            inputs = dict(extra)
            if extra:
                inputs["token_positions"] = positions[:, now]
            x, cache = call(
                {
                    "token_ids": tokens[:, now],
                    "cache": cache,
                    "cache_update_index": now.start,
                    **inputs,
                }
            )
            outputs.append(to_numpy(x))
        states.append(np.concatenate(outputs, axis=1))
    plain, shifted = states
    np.testing.assert_allclose(plain[0], shifted[0], atol=3e-5, rtol=3e-5)
    if policy != "int8":
        np.testing.assert_allclose(
            plain[1, :25], shifted[1, 5:], atol=3e-5, rtol=3e-5
        )
