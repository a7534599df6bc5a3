"""Many prompts in few places: each answer is what it is alone."""

import gc
import types

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_nlp_cache import surgery
from keras_nlp_cache.generate.loops import places
from keras_nlp_cache.generate.loops.answers import padded
from tests.families import deep_families
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import on_one_backend
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import VOCABULARY_SIZE
from tests.families import XLA

BACKEND = keras.config.backend()
LLAMA = next(x for x in FAMILIES if x.name == "llama")


def token_prompts(count, longest=24, seed=0):
    """Prompts of random lengths, each to be continued by some tokens."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": rng.integers(
                1, VOCABULARY_SIZE, rng.integers(1, longest)
            ),
            "max_new_tokens": int(rng.integers(1, 12)),
        }
        for _ in range(count)
    ]


def new_lm(family, sampler="greedy", **kwargs):
    lm = family.task(family.backbone())
    lm.compile(sampler=sampler, **kwargs)
    return lm


def generated(lm, prompts, **kwargs):
    kwargs.setdefault("stop_token_ids", None)
    return [np.asarray(x) for x in lm.generate(prompts, **kwargs)]


def assert_likeliest(lm, prompts, answers):
    """Each token that follows a prompt is what a call without a cache says."""
    lengths = [len(x) for x in answers]
    token_ids = np.zeros((len(answers), max(lengths)), "int32")
    for row, answer in zip(token_ids, answers):
        row[: len(answer)] = answer
    logits = lm({"token_ids": token_ids, "padding_mask": token_ids * 0 + 1})
    likeliest = to_numpy(logits).argmax(axis=-1)
    for prompt, answer, row in zip(prompts, answers, likeliest):
        given = len(prompt["prompt"])
        assert len(answer) == given + prompt["max_new_tokens"]
        np.testing.assert_array_equal(answer[:given], prompt["prompt"])
        np.testing.assert_array_equal(
            answer[given:], row[given - 1 : len(answer) - 1]
        )


def bytes_of_arrays():
    """The bytes of all arrays that the backend holds for this process."""
    gc.collect()
    if BACKEND == "jax":
        import jax

        return sum(x.nbytes for x in jax.live_arrays())
    if BACKEND == "torch":
        import torch

        found = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in gc.get_objects()
            if isinstance(x, torch.Tensor) and x.device.type == "cpu"
        }
        return sum(found.values())
    import tensorflow as tf

    variables = [x for x in gc.get_objects() if isinstance(x, tf.Variable)]
    return sum(int(np.prod(x.shape)) * x.dtype.size for x in variables)


def cache_bytes(lm, batch, slots):
    cache = lm.backbone.make_cache(batch, slots)
    return sum(to_numpy(x).nbytes for x in keras.tree.flatten(cache))


@each_kind
def test_each_answer_is_its_own(family):
    lm, prompts = new_lm(family, **XLA), token_prompts(7)
    answers = generated(lm, prompts, batch_size=3)
    assert_likeliest(lm, prompts, answers)


def test_many_prompts_compile_little_and_take_no_more_memory(monkeypatch):
    lm, prompts = new_lm(LLAMA, **XLA), token_prompts(200)
    made, of_all, of_one = [], cache_bytes(lm, 8, 256), cache_bytes(lm, 1, 256)
    make_cache = lm.backbone.make_cache

    def count(*args, zeros=None, **kwargs):
        # Where it is compiled, what says nothing is for the compiler, too.
        says = BACKEND == "torch" if zeros is None else True
        if says and zeros is not keras.KerasTensor:
            made.append(args[:2])
        zeros = {} if zeros is None else {"zeros": zeros}
        return make_cache(*args, **kwargs, **zeros)

    monkeypatch.setattr(lm.backbone, "make_cache", count)
    answers, sizes = [None] * len(prompts), []
    results = lm.generate_many(iter(prompts), batch_size=8, stop_token_ids=None)
    for i, answer in results:
        answers[i] = np.asarray(answer)
        if i in (60, 180):
            sizes.append(bytes_of_arrays())
    assert_likeliest(lm, prompts, answers)
    assert sizes[0] >= of_all
    # What a few prompts differ by is far less than a cache of one row.
    assert sizes[1] < sizes[0] + of_one / 2
    if BACKEND != "torch":
        # A prompt that has nothing in common with the last is read anew.
        assert sorted(made) == [(1, 256), (8, 256)]
    assert {batch for batch, _ in made} == {1, 8}
    assert 0 < lm.generation_loop.compilations <= 6


def test_places_are_taken_as_they_become_free():
    lm = new_lm(LLAMA)
    counts = [3, 20, 4, 5, 2]
    prompts = [
        {"prompt": [5, 6, 7 + i], "max_new_tokens": n}
        for i, n in enumerate(counts)
    ]
    taken = []

    def one_by_one():
        for i, prompt in enumerate(prompts):
            taken.append(i)
            yield prompt

    results = lm.generate_many(one_by_one(), batch_size=2, stop_token_ids=None)
    index, _ = next(results)
    # Not all were asked for.
    assert index == 0 and taken == [0, 1]
    assert [i for i, _ in results] == [2, 3, 4, 1]
    assert taken == [0, 1, 2, 3, 4]


def test_newcomers_are_read_between_steps(monkeypatch):
    """A long prompt keeps nobody waiting until it is read."""
    monkeypatch.setattr(places, "_READ", 16)
    lm = new_lm(LLAMA)
    loop, done = lm.generation_loop, []
    read, decode = loop.read, loop.decode

    def recorded_read(
        token_ids, length, slots, cache=None, start=0, source=None
    ):
        done.append(int(length) - 1 - int(start))
        return read(token_ids, length, slots, cache, start, source)

    def recorded_decode(*args):
        done.append("step")
        return decode(*args)

    monkeypatch.setattr(loop, "read", recorded_read)
    monkeypatch.setattr(loop, "decode", recorded_decode)
    prompts = [
        {"prompt": [5], "max_new_tokens": 3},
        {"prompt": [6], "max_new_tokens": 60},
        {"prompt": random_tokens(1, 50)[0], "max_new_tokens": 2},
    ]
    assert_likeliest(lm, prompts, generated(lm, prompts, batch_size=2))
    later = done[done.index("step") + 1 :]
    assert later[:7] == [16, "step", 16, "step", 16, "step", 1]


@in_turn("batch_size", [1, 3])
def test_a_common_beginning_is_read_once(family, batch_size, monkeypatch):
    lm, prefix = new_lm(family), random_tokens(1, 20)[0]
    readers = []
    init = places.Reader.__init__

    def recorded(self, *args):
        init(self, *args)
        readers.append(self)

    monkeypatch.setattr(places.Reader, "__init__", recorded)
    prompts = [
        {"prompt": np.append(prefix, [i + 1, i + 2]), "max_new_tokens": 4}
        for i in range(5)
    ]
    found = generated(lm, prompts, batch_size=batch_size)
    assert_likeliest(lm, prompts, found)
    assert readers[-1].tokens_read == 21 + 4
    short = [{**x, "prompt": x["prompt"][20:]} for x in prompts]
    given = generated(lm, short, batch_size=batch_size, prefix=prefix)
    assert readers[-1].tokens_read == 21 + 4
    for a, b in zip(found, given):
        np.testing.assert_array_equal(a, b)


def test_longer_texts_get_more_slots():
    lm = new_lm(LLAMA)
    prompts = [{"prompt": [5, 6], "max_new_tokens": n} for n in (3, 4, 300, 2)]
    answers = dict(
        lm.generate_many(iter(prompts), batch_size=2, stop_token_ids=None)
    )
    assert_likeliest(lm, prompts, [answers[i] for i in range(4)])


@in_turn("sampler", ["top_k", "top_p", "random"])
def test_a_seed_says_what_is_drawn_whoever_the_neighbors_are(family, sampler):
    make = {
        "top_k": lambda: keras_hub.samplers.TopKSampler(k=20, seed=1),
        "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.95, seed=1),
        "random": lambda: keras_hub.samplers.RandomSampler(seed=1),
    }[sampler]
    lm = new_lm(family, make())
    prompts = [{**x, "seed": i} for i, x in enumerate(token_prompts(5))]
    together = generated(lm, prompts, batch_size=3)
    for prompt, answer in zip(prompts, together):
        np.testing.assert_array_equal(generated(lm, [prompt])[0], answer)
    # One seed for all, and where the sampler is.
    without = token_prompts(5)
    first = generated(lm, without, seed=1)
    lm.compile(sampler=make())
    for again in (
        generated(lm, without, batch_size=2),
        generated(lm, without, batch_size=2, seed=1),
    ):
        for a, b in zip(first, again):
            np.testing.assert_array_equal(a, b)
    # It goes on, after what was drawn.
    other = generated(lm, without)
    assert any((a != b).any() for a, b in zip(first, other))


def test_several_texts_for_a_prompt():
    sampler = keras_hub.samplers.RandomSampler(seed=0)
    lm = new_lm(LLAMA, sampler)
    prompts = token_prompts(2)
    texts = generated(lm, prompts, num_return_sequences=3, seed=5)
    assert len(texts) == 6
    for i, text in enumerate(texts):
        given = prompts[i // 3]["prompt"]
        np.testing.assert_array_equal(text[: len(given)], given)
    assert len({x.tobytes() for x in texts}) > 2


@deep_families
def test_edited_models(family):
    """What was done to the graph shows in every row."""
    vector = np.full(32, 0.5, "float32")
    lm = new_lm(family)
    edited = surgery.insert_after(lm, 0, keras.layers.Rescaling(-2.0))
    edited.compile(sampler="greedy")
    prompts = token_prompts(4)
    answers = generated(edited, prompts, batch_size=2)
    assert_likeliest(edited, prompts, answers)
    del vector


def test_methods_that_users_override_are_called():
    lm = new_lm(LLAMA)
    calls = []

    def call_with_cache(self, token_ids, cache, cache_update_index, **kwargs):
        calls.append(np.shape(cache_update_index))
        logits, *rest = type(self).call_with_cache(
            self, token_ids, cache, cache_update_index, **kwargs
        )
        return -logits, *rest

    lm.call_with_cache = types.MethodType(call_with_cache, lm)
    prompts = token_prompts(3)
    answers = generated(lm, prompts)
    lengths = [len(x["prompt"]) for x in prompts]
    token_ids = np.zeros((3, 40), "int32")
    mask = np.arange(40) < np.array(lengths)[:, None]
    token_ids[mask] = np.concatenate([x["prompt"] for x in prompts])
    old = lm.generate(
        {"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None
    )["token_ids"]
    for answer, row in zip(answers, old):
        np.testing.assert_array_equal(answer, row[: len(answer)])
    # Nobody is told of an index for each row who does not know of it.
    assert set(calls) == {()}


def test_guesses_for_a_method_that_users_override():
    """It knows of one index for all, and rows accept as much as they do."""
    lm, prompts = new_lm(LLAMA), token_prompts(3)
    draft = surgery.insert_before(lm, 1, keras.layers.Rescaling(1.5))
    draft.compile(sampler="greedy")
    expected = generated(lm, prompts)
    call = lm.call_with_cache
    lm.call_with_cache = lambda *args, **kwargs: call(*args, **kwargs)
    for kwargs in ({}, {"assistant_model": draft}):
        for a, b in zip(expected, generated(lm, prompts, **kwargs)):
            np.testing.assert_array_equal(a, b)
    token_ids, mask = padded([x["prompt"] for x in prompts])
    space = ((0, 0), (0, 12))
    inputs = {
        "token_ids": np.pad(token_ids, space),
        "padding_mask": np.pad(mask, space),
    }
    plain = lm.generate(inputs, stop_token_ids=None)
    guessed = lm.generate(inputs, stop_token_ids=None, assistant_model=draft)
    np.testing.assert_array_equal(plain["token_ids"], guessed["token_ids"])


def test_results_as_dictionaries():
    lm = new_lm(LLAMA)
    prompts = token_prompts(3)
    (first, *_), plain = (
        lm.generate(
            prompts,
            batch_size=2,
            stop_token_ids=None,
            return_dict=True,
            return_logprobs=3,
        ),
        generated(lm, prompts),
    )
    given = len(prompts[0]["prompt"])
    assert first["prompt_tokens"] == given
    assert first["finish_reason"] == "length" and "text" not in first
    np.testing.assert_array_equal(first["token_ids"], plain[0][given:])
    token_ids = plain[0][None]
    logits = lm({"token_ids": token_ids, "padding_mask": token_ids * 0 + 1})
    logprobs = to_numpy(ops.log_softmax(logits, axis=-1))[0, given - 1 : -1]
    for told, row in zip(first["logprobs"], logprobs, strict=True):
        assert told["token_id"] == row.argmax()
        assert told["logprob"] == pytest.approx(row.max(), abs=1e-4)
        likeliest = np.argsort(-row)[:3]
        assert [i for i, _ in told["top_logprobs"]] == likeliest.tolist()
        assert [x for _, x in told["top_logprobs"]] == pytest.approx(
            row[likeliest].tolist(), abs=1e-4
        )
    stop = int(first["token_ids"][0])
    (stopped,) = lm.generate(
        prompts[:1], stop_token_ids=[stop], return_dict=True
    )
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"].tolist() == [stop]


@deep_families
def test_stop_strings(family):
    lm = family.text_lm()
    prompts = ["the fox", "what is the capital", "a"]
    texts = lm.generate(
        prompts, max_new_tokens=20, stop_token_ids=None, strip_prompt=True
    )
    # One in the middle of each text, over tokens that may be letters.
    for text, prompt in zip(texts, prompts):
        stop = text[4:7]
        found = lm.generate(
            prompts,
            max_new_tokens=20,
            stop_token_ids=None,
            strip_prompt=True,
            stop_strings=[stop],
        )
        assert found == [x.split(stop)[0] for x in texts]
        whole = lm.generate(
            prompt,
            max_new_tokens=20,
            stop_token_ids=None,
            stop_strings=[stop],
            return_dict=True,
        )
        assert whole["finish_reason"] == "stop"
        assert whole["text"] == prompt + text.split(stop)[0]
        # No token is told of that comes after it.
        tokenizer = lm.preprocessor.tokenizer
        ids = whole["token_ids"]
        assert stop in tokenizer.detokenize(ids)
        assert stop not in tokenizer.detokenize(ids[:-1])


def test_logits_processors_of_transformers():
    """A loop over transformers' processors says the same tokens."""
    from transformers import LogitsProcessorList
    from transformers import MinPLogitsWarper
    from transformers import NoBadWordsLogitsProcessor
    from transformers import RepetitionPenaltyLogitsProcessor

    torch = pytest.importorskip("torch")
    lm, prompts = new_lm(LLAMA), token_prompts(4)
    prompts = [{**x, "max_new_tokens": 10} for x in prompts]
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(2.5),
            NoBadWordsLogitsProcessor([[7], [3, 9], [4]], eos_token_id=99),
            MinPLogitsWarper(0.1),
        ]
    )
    answers = generated(
        lm,
        prompts,
        batch_size=2,
        repetition_penalty=2.5,
        bad_words=[[7], [3, 9], [4]],
        min_p=0.1,
    )
    for prompt, answer in zip(prompts, answers):
        given = len(prompt["prompt"])
        logits = to_numpy(
            lm(
                {
                    "token_ids": answer[None],
                    "padding_mask": np.ones_like(answer)[None],
                }
            )
        )[0]
        for i in range(given, len(answer)):
            scores = processors(
                torch.tensor(answer[None, :i].astype("int64")),
                torch.tensor(logits[None, i - 1]),
            )
            assert int(scores[0].argmax()) == answer[i]
    assert any((a != b).any() for a, b in zip(answers, generated(lm, prompts)))


def test_a_function_of_the_users_is_compiled_with_the_loop():
    lm, prompts = new_lm(LLAMA), token_prompts(3)
    calls = []

    def only_odd(token_ids, logits, lengths):
        calls.append(1)
        odd = ops.arange(logits.shape[1]) % 2 == 1
        return ops.where(odd, logits, -1e9)

    answers = generated(lm, prompts, logits_processor=only_odd)
    for prompt, answer in zip(prompts, answers):
        assert (answer[len(prompt["prompt"]) :] % 2 == 1).all()
    if BACKEND == "jax":
        before = len(calls)
        generated(lm, prompts, logits_processor=only_odd)
        assert len(calls) == before


MISTAKES = {
    "no length": (
        {"inputs": [[5]], "return_dict": True},
        "`max_new_tokens` or `max_length`",
    ),
    "no tokens": (
        {"inputs": [[5], []], "max_new_tokens": 2},
        "at least one token. Received: none in prompt 1",
    ),
    "an unknown key": (
        {"inputs": [{"prompt": [5], "sead": 1}], "max_new_tokens": 2},
        "prompt 0 .* `prompt` .*sead",
    ),
    "a seed that is none": (
        {"inputs": [{"prompt": [5], "seed": "a"}], "max_new_tokens": 2},
        "`seed` of prompt 0",
    ),
    "text without a preprocessor": (
        {"inputs": ["the fox"], "max_new_tokens": 2, "stop_token_ids": None},
        "no `preprocessor`",
    ),
    "too long": (
        {"inputs": [[5] * 9], "max_length": 8, "max_new_tokens": 2},
        "at most 8 tokens.*prompt 0 of 9",
    ),
    "ids that are not in the vocabulary": (
        {"inputs": [[5, 1000]], "max_new_tokens": 2},
        "from 0 to 99",
    ),
    "no places": (
        {"inputs": [[5]], "max_new_tokens": 2, "batch_size": 0},
        "`batch_size`",
    ),
    "two that guess": (
        {
            "inputs": [[5]],
            "max_new_tokens": 2,
            "prompt_lookup_num_tokens": 2,
            "assistant_model": "itself",
        },
        "one that guesses",
    ),
    "stop strings without text": (
        {"inputs": [[5]], "max_new_tokens": 2, "stop_strings": "a"},
        "no `stop_strings`",
    ),
    "no new tokens": (
        {"inputs": [[5]], "max_new_tokens": 0},
        "`max_new_tokens`",
    ),
}


@on_one_backend("mistakes are found before anything is computed")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    lm = LLAMA.lm_pair[0]
    lm.compile(sampler="greedy")
    kwargs, message = dict(MISTAKES[name][0]), MISTAKES[name][1]
    kwargs.setdefault("stop_token_ids", None)
    if kwargs.get("assistant_model") == "itself":
        kwargs["assistant_model"] = lm
    with pytest.raises(ValueError, match=message):
        lm.generate(**kwargs)


def test_guesses_of_each_row_are_its_own(monkeypatch):
    """What one row accepts does not depend on what another one does."""
    lm = new_lm(LLAMA)
    draft = surgery.remove(lm, 1)
    draft.compile(sampler="greedy")
    prompts = [{**x, "max_new_tokens": 20} for x in token_prompts(4)]
    plain = generated(lm, prompts)
    loop, accepted = lm.generation_loop, []
    verify = loop.verify

    def recorded(generation, *args):
        before = np.array(ops.convert_to_numpy(generation.index))
        generation = verify(generation, *args)
        after = np.array(ops.convert_to_numpy(generation.index))
        accepted.append(after - before)
        return generation

    monkeypatch.setattr(loop, "verify", recorded)
    for kwargs in (
        {"assistant_model": lm},
        {"assistant_model": draft},
        {"prompt_lookup_num_tokens": 3},
    ):
        accepted.clear()
        for a, b in zip(plain, generated(lm, prompts, **kwargs)):
            np.testing.assert_array_equal(a, b)
        if kwargs.get("assistant_model") is lm:
            # Its own guesses are right: six tokens at a time.
            assert len(accepted) == 4
        else:
            assert any(len(set(x.tolist())) > 1 for x in accepted)
