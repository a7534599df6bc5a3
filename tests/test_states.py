"""Layers that keep a state: what moves it, and that it cannot go back."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import tree

import keras_nlp_cache
from keras_nlp_cache import surgery
from keras_nlp_cache.cache.policies.state import is_state
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.generate.loops import generation as loop_module
from tests.edits import cached_forward
from tests.edits import EDITS
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import original
from tests.edits import TOKENS
from tests.families import assert_greedy
from tests.families import assert_greedy_after
from tests.families import compiled
from tests.families import divided
from tests.families import every_stateful
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import STATEFUL
from tests.families import to_numpy
from tests.families import XLA

# Of blocks as a whole.
BLOCK_EDITS = (
    "insert_after",
    "insert_before",
    "insert_a_block",
    "replace_by_a_layer",
    "replace_by_a_block",
    "remove",
    "repeat_blocks",
    "keep_blocks",
    "rewire",
    "tap",
)
PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}


def states(cache):
    return [to_numpy(x.stored) for pair in cache for x in pair if is_state(x)]


def read(backbone, token_ids, cache=None, index=0, **inputs):
    """What a call makes of tokens, and the cache after it."""
    if cache is None:
        cache = backbone.make_cache(len(token_ids), 16)
    x, cache = compiled(backbone)(
        {
            "token_ids": token_ids,
            "cache": cache,
            "cache_update_index": index,
            **inputs,
        }
    )
    return to_numpy(x), cache


def assert_close(x, y):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


# === What there is of it ===


@every_stateful
def test_its_memory_does_not_grow(family):
    backbone, _ = family.pair

    def count_bytes(max_length, which):
        cache = backbone.make_cache(2, max_length)
        pairs = [pair for pair in cache if which(pair[0])]
        return sum(int(np.prod(x.shape)) * 4 for x in tree.flatten(pairs))

    few, many = (count_bytes(n, is_state) for n in (16, 4096))
    assert 0 < few == many
    of_tokens = [count_bytes(n, lambda x: not is_state(x)) for n in (16, 4096)]
    assert of_tokens[1] == 256 * of_tokens[0]
    if family.name == "rwkv7":
        assert of_tokens == [0, 0]


@every_stateful
def test_layers_that_remember_have_an_entry_each(family):
    backbone, _ = family.pair
    layers = [x for block in backbone.blocks for x in block.remembering()]
    assert len(backbone.cache_spec) == len(layers)
    for layer, spec in zip(layers, backbone.cache_spec):
        assert isinstance(spec, StateShapes) == (layer.state_shapes is not None)
    # Eight bits are for keys and values.
    kept = [
        x for pair in backbone.make_cache(1, 16, policy="int8") for x in pair
    ]
    assert any(is_state(x) for x in kept)
    for x in kept:
        if is_state(x):
            assert keras.backend.standardize_dtype(x.stored.dtype) == "float32"


# === What moves it ===


@every_stateful
def test_padding_does_not_move_it(family):
    backbone, _ = family.pair
    token_ids = random_tokens(2, 7)
    _, together = read(
        backbone, token_ids, padding_mask=padding_mask([3, 7], 16)
    )
    for row, length in enumerate((3, 7)):
        _, alone = read(backbone, token_ids[row : row + 1, :length])
        for x, y in zip(states(together), states(alone)):
            assert_close(x[row], y[0])
    # A call of padding alone leaves it as it is.
    nothing = np.zeros((2, 16), "int32")
    for length in (1, 2):
        _, after = read(
            backbone, token_ids[:, :length], together, 7, padding_mask=nothing
        )
        for x, y in zip(states(after), states(together)):
            np.testing.assert_array_equal(x, y)


@every_stateful
def test_where_calls_end_does_not_matter(family):
    backbone, _ = family.pair
    token_ids = random_tokens(1, 12)
    _, whole = read(backbone, token_ids)
    cache, index = None, 0
    for size in (5, 1, 1, 5):
        now = token_ids[:, index : index + size]
        _, cache = read(backbone, now, cache, index)
        index += size
    for x, y in zip(states(cache), states(whole)):
        assert_close(x, y)


@every_stateful
def test_a_text_begins_with_none(family):
    """Whatever was read into a cache before."""
    backbone, _ = family.pair
    first, second = random_tokens(2, 5), random_tokens(2, 5, seed=1)
    expected, _ = read(backbone, second)
    _, used = read(backbone, first)
    output, _ = read(backbone, second, used)
    assert_close(output, expected)
    # In some rows, others go on.
    _, used = read(backbone, first)
    mixed = np.array([0, 5], "int32")
    output, _ = read(backbone, second, used, mixed)
    assert_close(output[0], expected[0])
    assert np.abs(output[1] - expected[1]).max() > 1e-3


# === Generating ===


@every_stateful
def test_prompts_of_several_chunks(family):
    """Of other lengths each, read in chunks of 32 or whole."""
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompts = {
        "token_ids": random_tokens(2, 76) * padding_mask([39, 72], 76),
        "padding_mask": padding_mask([39, 72], 76),
    }
    together = lm.generate(prompts, stop_token_ids=None)["token_ids"]
    assert_greedy_after(prompts, together, lm)


@every_stateful
def test_the_end_of_a_cache(family):
    """Where there is no room for one more chunk, tokens are read one by one."""
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    loop = lm.generation_loop
    token_ids, given = random_tokens(1, 44), np.ones((1, 44), bool)
    start = loop.prefill(token_ids[:, :6], given[:, :6], 48)
    generation = loop.prefill(token_ids, given, 48, start.cache, start=5)
    generation = loop.decode(generation, 48)
    assert_greedy(lm, np.asarray(generation.token_ids), 44)


@every_stateful
def test_many_prompts(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompts = [random_tokens(1, n, n)[0] for n in (3, 9, 5, 5, 12)]
    # With the same beginning, too.
    prompts.append(np.append(prompts[4], 7))
    found = lm.generate(
        prompts, max_new_tokens=4, stop_token_ids=None, batch_size=2
    )
    for prompt, token_ids in zip(prompts, found):
        assert_greedy(lm, np.array([token_ids]), len(prompt))


# === Going back ===


@pytest.fixture
def session_of(monkeypatch):
    # For a text to outgrow its cache soon.
    monkeypatch.setattr(loop_module, "FEWEST_SLOTS", 16)

    def start(family):
        preprocessor = FAMILIES[0].preprocessor()
        size = preprocessor.tokenizer.vocabulary_size()
        lm = family.task(family.backbone(vocabulary_size=size), preprocessor)
        lm.compile(sampler="greedy")
        return lm.start_session()

    return start


def send(session, words="the fox", count=4):
    session.send(words, max_new_tokens=count, stop_token_ids=None)
    token_ids = np.array([session.token_ids])
    assert_greedy(session.lm, token_ids, token_ids.shape[1] - count)


@every_stateful
def test_sessions(family, session_of, tmp_path):
    session = session_of(family)
    send(session)
    send(session, " and the lazy dog", 12)
    assert len(session.token_ids) > 16
    # Where it stands, it may be copied and saved.
    other = session.fork()
    session.save(tmp_path / "text.safetensors")
    loaded = session.lm.start_session(tmp_path / "text.safetensors")
    send(session, " jumps")
    for copy in (other, loaded):
        send(copy, " jumps")
        np.testing.assert_array_equal(copy.token_ids, session.token_ids)
    assert loaded.prefilled_tokens < 12
    before = session.token_ids
    with pytest.raises(ValueError, match="a state, which cannot go back"):
        session.rewind(1)
    np.testing.assert_array_equal(session.token_ids, before)
    send(session, " over")
    session.rewind(len(session.token_ids))
    send(session, "a dog")


@every_stateful
def test_a_chat_whose_template_takes_back(family, session_of):
    """What was said is read again, where it is written otherwise by now."""
    session = session_of(family)
    session.lm.chat_template = (
        "{% for m in messages %}{{ 'the' if loop.last else 'a' }} "
        "{{ m.content }} {% endfor %}"
    )
    session.chat("fox", max_new_tokens=3, stop_token_ids=None)
    session.chat("dog", max_new_tokens=3, stop_token_ids=None)
    token_ids = np.array([session.token_ids])
    assert_greedy(session.lm, token_ids, token_ids.shape[1] - 3)


@every_stateful
def test_refused(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    backbone = lm.backbone
    cannot = "a state, which cannot go back"
    with pytest.raises(ValueError, match=cannot):
        lm.generate(
            [[5, 6, 5]],
            max_new_tokens=2,
            stop_token_ids=None,
            prompt_lookup_num_tokens=2,
        )
    llama = next(x for x in FAMILIES if x.name == "llama").lm_pair[0]
    llama.compile(sampler="greedy")
    with pytest.raises(ValueError, match=cannot):
        llama.generate(PROMPTS, stop_token_ids=None, assistant_model=lm)
    mask = np.ones((2, LENGTH, LENGTH), bool)
    with pytest.raises(ValueError, match="no `attention_mask`.*state"):
        backbone({"token_ids": TOKENS, "attention_mask": mask})
    cache = [list(pair) for pair in backbone.make_cache(2, LENGTH)]
    at = next(i for i, pair in enumerate(cache) if is_state(pair[0]))
    inputs = {"token_ids": TOKENS, "cache_update_index": 0}
    state = cache[at][0]
    cache[at][0] = state.stored
    with pytest.raises(ValueError, match=rf"cache\[{at}\]\[0\].*`State`"):
        backbone({**inputs, "cache": cache})
    cache[at][0] = state._replace(stored=state.stored[:1])
    with pytest.raises(ValueError, match=rf"cache\[{at}\]\[0\].*batch=2"):
        backbone({**inputs, "cache": cache})
    whole = keras.ops.cast(state.stored, "bfloat16")
    cache[at][0] = state._replace(stored=whole)
    with pytest.raises(ValueError, match=rf"cache\[{at}\]\[0\].*float32.*bfl"):
        backbone({**inputs, "cache": cache})
    cache[at][0] = state
    with pytest.raises(ValueError, match=r"one integer.*0\.5"):
        backbone({**inputs, "cache": cache, "cache_update_index": 0.5})
    with pytest.raises(ValueError, match=r"`cache`.*list of 1 "):
        backbone({**inputs, "cache": cache[:1]})
    # Of the call alone, and not of what was read before.
    inputs |= {"cache": cache, "cache_update_index": 2}
    inputs["token_ids"] = TOKENS[:, 2:4]
    with pytest.raises(ValueError, match=r"`padding_mask`.*\(2, 2\)"):
        backbone({**inputs, "padding_mask": np.ones((2, 2), "int32")})
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    with pytest.raises(ValueError, match="one token at a time.*BeamSampler"):
        lm.generate(PROMPTS, stop_token_ids=None)
    with pytest.raises(ValueError, match="keep a state.*no attention weights"):
        surgery.add_attention_sink(backbone, 1)


# === A task's other methods ===


@every_stateful
def test_training(family):
    """The losses of upstream, and what was learned is generated."""
    ours = family.task(family.backbone())
    upstream = family.upstream_task(family.upstream_backbone(ours.backbone))
    losses = []
    for lm in (ours, upstream):
        lm.compile(
            optimizer=keras.optimizers.SGD(1e-5),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            sampler="greedy",
            **XLA,
        )
        history = lm.fit(
            {"token_ids": TOKENS, "padding_mask": PROMPTS["padding_mask"]},
            np.roll(TOKENS, -1, axis=1),
            sample_weight=PROMPTS["padding_mask"].astype("float32"),
            shuffle=False,
            epochs=2,
            verbose=0,
        )
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][1] < losses[0][0]
    generated = ours.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], ours)


@every_stateful
def test_scores(family):
    lm, upstream = family.lm_pair
    found = to_numpy(lm.score(TOKENS, PROMPTS["padding_mask"]))
    if hasattr(upstream, "score"):
        expected = upstream.score(TOKENS, PROMPTS["padding_mask"])
    else:
        inputs = {"token_ids": TOKENS, "padding_mask": PROMPTS["padding_mask"]}
        expected = upstream(inputs)
    np.testing.assert_allclose(found, to_numpy(expected), atol=2e-4, rtol=2e-4)


@every_stateful
def test_half_precision(family):
    """What is computed is rounded, and what is kept of it is not."""
    backbone = family.backbone(dtype="bfloat16")
    output, cache = read(backbone, TOKENS[:, :5])
    assert all(
        keras.backend.standardize_dtype(x.stored.dtype) == "float32"
        for pair in cache
        for x in pair
        if is_state(x)
    )
    rest, _ = read(backbone, TOKENS[:, 5:], cache, 5)
    full = full_forward(backbone)
    assert np.abs(np.concatenate([output, rest], axis=1) - full).mean() < 0.05
    assert np.abs(full).mean() > 0.5


# === Surgery ===


@every_stateful
@pytest.mark.parametrize("edit", divided(BLOCK_EDITS))
def test_edits_of_blocks(family, edit, tmp_path):
    lm = original(family)
    before = full_forward(lm.backbone)
    edited = EDITS[edit].apply(lm)
    assert len(edited.backbone.blocks) == EDITS[edit].caches
    full = full_forward(edited.backbone)
    np.testing.assert_allclose(
        cached_forward(edited.backbone), full, atol=1e-4, rtol=1e-3
    )
    changes = edit not in ("tap", "replace_by_a_block")
    assert (np.abs(full - before).max() > 1e-3) or not changes
    np.testing.assert_array_equal(full_forward(lm.backbone), before)
    edited.compile(sampler="greedy")
    generated = edited.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], edited)
    edited.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras").backbone
    np.testing.assert_allclose(full_forward(loaded), full, atol=1e-5)


@every_stateful
def test_a_block_among_those_of_another_family(family):
    llama = next(x for x in FAMILIES if x.name == "llama")
    donor = family.backbone(num_layers=2).blocks[1]
    edited = surgery.insert_after(original(llama), 0, donor)
    assert edited.backbone.has_states and len(edited.backbone.blocks) == 4
    np.testing.assert_allclose(
        cached_forward(edited.backbone),
        full_forward(edited.backbone),
        atol=1e-4,
        rtol=1e-3,
    )
    edited.compile(sampler="greedy")
    generated = edited.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], edited)


def test_values_of_the_first_block():
    """They go on to those that follow, over blocks that are removed."""
    rwkv7 = next(x for x in STATEFUL if x.name == "rwkv7")
    lm = original(rwkv7)
    first, _, last = lm.backbone.blocks
    x = lm.backbone.token_embedding(keras.ops.convert_to_tensor(TOKENS))
    x, values = first(x)
    x, _ = last(x, v_first=values)
    expected = lm.backbone.head(lm.backbone.output_layer_norm(x))
    removed = surgery.remove(lm.backbone, 1)
    np.testing.assert_allclose(
        full_forward(removed), to_numpy(expected), atol=1e-5
    )


# === Text ===

EURO = "\N{EURO SIGN}".encode()


@pytest.fixture(scope="module")
def rwkv7():
    """A task with a tokenizer as upstream makes them."""
    family = next(x for x in STATEFUL if x.name == "rwkv7")
    words = ["<pad>", "\n\n", "the", " ", "fox", *"abcdefghijklmnopqrstuvwxyz"]
    words += [EURO[:1], EURO[1:]]
    vocabulary = [f"{i} {word!r} {len(word)}\n" for i, word in enumerate(words)]
    # Of some numbers, there is no word.
    backbone = family.backbone(vocabulary_size=len(words) + 2)
    preprocessor = keras_hub.models.RWKV7CausalLMPreprocessor(
        keras_hub.models.RWKVTokenizer(vocabulary=vocabulary),
        sequence_length=16,
    )
    lm = family.task(backbone, preprocessor)
    lm.compile(sampler="greedy")
    return lm, preprocessor


def test_text_of_rwkv(rwkv7):
    lm, theirs = rwkv7
    found = lm.generate(["the fox", "a"], max_length=12, stop_token_ids=None)
    for prompt, answer in zip(["the fox", "a"], found):
        assert answer.startswith(prompt) and len(answer) > len(prompt)
    assert lm.generate("a", max_length=12, stop_token_ids=None) == found[1]
    # To train, what upstream's makes of texts, padded on the left.
    prepared = lm.preprocessor(["the fox"])
    for x, y in zip(tree.flatten(prepared), tree.flatten(theirs(["the fox"]))):
        np.testing.assert_array_equal(x, y)
    # Padding there changes nothing, so that is how it is generated, too.
    inputs, _, _ = prepared
    real = to_numpy(inputs["padding_mask"]) == 1
    assert not real[0, 0] and real[0, -1]
    token_ids = to_numpy(inputs["token_ids"]).astype("int32")[:, real[0]]
    alone = full_forward(lm.backbone, token_ids)
    np.testing.assert_allclose(
        to_numpy(lm(inputs))[:, real[0]], alone, atol=1e-5, rtol=1e-5
    )


def test_text_of_any_tokens_of_rwkv(rwkv7):
    lm, theirs = rwkv7
    tokenizer, upstream = lm.preprocessor.tokenizer, theirs.tokenizer
    assert tokenizer._tokenizer is upstream._tokenizer
    tokens = [2, 3, 4, 31, 32]
    text = "the fox\N{EURO SIGN}"
    assert upstream.detokenize([tokens]) == [text]
    for same in (tokens, np.array(tokens), keras.ops.convert_to_tensor(tokens)):
        assert tokenizer.detokenize(same) == text
    assert tokenizer.detokenize([tokens, [0, 2, 34]]) == [text, "the"]
    # In the middle of a character.
    assert tokenizer.detokenize([2, 31]) == "the\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UnicodeDecodeError):
        upstream.detokenize([[2, 31]])


def test_text_of_rwkv_as_it_is_produced(rwkv7):
    lm, _ = rwkv7
    expected = lm.generate("the fox", max_new_tokens=8, stop_token_ids=None)
    pieces = list(lm.stream("the fox", max_new_tokens=8, stop_token_ids=None))
    assert "the fox" + "".join(pieces) == expected
    session = lm.start_session()
    session.send("the fox", max_new_tokens=8, stop_token_ids=None)
    assert session.text == expected
    # An answer may end with a token of which upstream says the bytes.
    lm.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    session = lm.start_session()
    session.chat("fox", max_new_tokens=4, stop_token_ids=None)
    end = int(session.token_ids[-1])
    session = lm.start_session()
    session.chat("fox", max_new_tokens=4, stop_token_ids=[end])
    session.chat("the dog", max_new_tokens=4, stop_token_ids=None)
    assert len(session.messages) == 4
    token_ids = np.array([session.token_ids])
    assert_greedy(lm, token_ids, token_ids.shape[1] - 4)


def test_a_preset_of_rwkv_goes_both_ways(rwkv7, tmp_path):
    lm, theirs = rwkv7
    lm.save_to_preset(tmp_path)
    upstream = keras_hub.models.RWKV7CausalLM.from_preset(str(tmp_path))
    assert type(upstream.preprocessor) is type(theirs)
    assert isinstance(upstream.preprocessor.tokenizer, type(theirs.tokenizer))
    loaded = keras_nlp_cache.models.CausalLM.from_preset(str(tmp_path))
    loaded.compile(sampler="greedy")
    options = {"max_length": 8, "stop_token_ids": None}
    expected = lm.generate("the fox", **options)
    assert loaded.generate("the fox", **options) == expected
