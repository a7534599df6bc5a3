"""A decoder reads what an encoder returned: once, and from its cache then."""

import copy

import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from keras_nlp_cache.generate.many.source_prompts import prompts_with_source
from tests.families import compiled
from tests.families import divided
from tests.families import ENCODER_DECODERS
from tests.families import every_encoder_decoder
from tests.families import examples
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import SOUND
from tests.families import SOURCE
from tests.families import SOURCE_AND_IMAGES
from tests.families import to_numpy
from tests.families import XLA

LENGTH = 16
TOKENS = random_tokens(2, 8)
GIVEN = [2, 5]
MASK = np.ones_like(TOKENS)
TEXTS = {
    "decoder_token_ids": random_tokens(2, LENGTH) * padding_mask(GIVEN, LENGTH),
    "decoder_padding_mask": padding_mask(GIVEN, LENGTH),
}


# What tasks with a preprocessor take.
TO_READ = (
    "the quick brown fox",
    ["the quick brown fox", "airplane"],
    {"encoder_text": "the capital", "decoder_text": "the fox"},
    {
        "encoder_text": ["the capital", "airplane at airport"],
        "decoder_text": ["the", "the quick brown"],
    },
)
TO_HEAR = (
    {"audio": SOUND["encoder_input_values"]},
    {
        "audio": SOUND["encoder_input_values"],
        "text": ["the", "the quick brown"],
    },
)


TO_SEE = (
    {"images": IMAGES[0], "encoder_text": "the quick brown fox"},
    {"images": IMAGES, "encoder_text": ["", "airplane"]},
    {
        "images": IMAGES,
        "encoder_text": ["the capital", "airplane at airport"],
        "decoder_text": ["the", "the quick brown"],
    },
)


def prompts_of(family):
    """Prompts for a task with a preprocessor, of several kinds."""
    if family.source is SOUND:
        return TO_HEAR
    return (*TO_READ, *TO_SEE) if "images" in family.source else TO_READ


def source_for(backbone):
    """What its encoder reads."""
    if "images" in backbone.input:
        return SOURCE_AND_IMAGES
    return SOUND if "encoder_input_values" in backbone.input else SOURCE


def encoded(backbone, source):
    """What its encoder makes of that, as inputs of the decoder alone."""
    names = backbone.roles.source_ids, backbone.roles.source_mask
    beside = {name: x for name, x in source.items() if name not in names}
    sequence, mask = backbone.encoded(*map(source.get, names), **beside)
    mask = ops.reshape(mask, sequence.shape[:2])
    return {"encoder_sequence": sequence, "encoder_padding_mask": mask}


def full_forward(backbone, token_ids=TOKENS, **source):
    """What becomes of the text without a cache, `(B, T, hidden_dim)`."""
    source = source or source_for(backbone)
    outputs = backbone({"decoder_token_ids": token_ids, **source})
    if isinstance(outputs, tuple):
        outputs, _ = outputs  # Taps come last.
    return to_numpy(backbone.hidden_states_of(outputs))


def cached_forward(
    backbone, sizes=(5, 1, 2), token_ids=TOKENS, call=None, **source
):
    """The same through a cache, of which only the first call reads a source."""
    cache, index, found = backbone.make_cache(*token_ids.shape), 0, []
    for size in sizes:
        inputs = {
            "decoder_token_ids": token_ids[:, index : index + size],
            "cache": cache,
            "cache_update_index": index,
        }
        if index == 0:
            inputs |= source or source_for(backbone)
        outputs, cache, *_ = (call or backbone)(inputs)
        if isinstance(outputs, dict):
            assert (outputs["encoder_sequence_output"] is None) == (index > 0)
        found.append(to_numpy(backbone.hidden_states_of(outputs)))
        index += size
    return np.concatenate(found, axis=1)


def assert_sound(backbone):
    """The graph is the same with its cache. Returns what it returns."""
    full = full_forward(backbone)
    np.testing.assert_allclose(
        cached_forward(backbone), full, atol=1e-4, rtol=1e-3
    )
    return full


def assert_greedy_after(prompts, generated, lm):
    """Each token that was generated is the likeliest after those before it."""
    token_ids = generated["decoder_token_ids"]
    given = prompts["decoder_padding_mask"] == 1
    np.testing.assert_array_equal(
        token_ids[given], prompts["decoder_token_ids"][given]
    )
    logits = lm(
        {
            **prompts,
            "decoder_token_ids": token_ids,
            "decoder_padding_mask": np.ones_like(token_ids),
        }
    )
    likeliest = to_numpy(logits).argmax(axis=-1)
    np.testing.assert_array_equal(
        token_ids[:, 1:][~given[:, 1:]], likeliest[:, :-1][~given[:, 1:]]
    )


def prompts_for(family):
    """A batch of two, whose texts begin with two tokens and with five."""
    return {**family.source, **TEXTS}


# === The graph ===


@every_encoder_decoder
@settings(max_examples=examples(8), deadline=None)
@given(sizes=st.sampled_from([(8,), (5, 1, 2), (1, 4, 3), (1,) * 8]))
def test_prefill_and_steps(family, sizes):
    backbone, _ = family.pair
    full = full_forward(backbone)
    call = compiled(backbone)
    np.testing.assert_allclose(
        cached_forward(backbone, sizes, call=call), full, atol=1e-4, rtol=1e-4
    )
    # What it reads and where it stands matters.
    for name, x in family.source.items():
        if name != "encoder_padding_mask":
            other = family.source | {name: x[::-1]}
            assert np.abs(full_forward(backbone, **other) - full).max() > 1e-2


@every_encoder_decoder
def test_the_decoder_alone(family):
    backbone, _ = family.pair
    full = full_forward(backbone)
    given = encoded(backbone, family.source)
    whole = backbone(family.inputs(TOKENS, np.ones_like(TOKENS)))
    if isinstance(whole, dict):
        np.testing.assert_array_equal(
            to_numpy(given["encoder_sequence"]),
            to_numpy(whole["encoder_sequence_output"]),
        )
    alone = full_forward(backbone, **given)
    np.testing.assert_allclose(alone, full, atol=1e-5, rtol=1e-5)
    cached = cached_forward(backbone, **given)
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=1e-4)


@every_encoder_decoder
def test_an_attention_mask_without_a_cache(family):
    backbone, _ = family.pair
    full = full_forward(backbone)
    seen = np.ones((2, 8, 8), "int32")
    inputs = {
        "decoder_token_ids": TOKENS,
        "attention_mask": seen,
        **family.source,
    }
    outputs = backbone.hidden_states_of(backbone(inputs))
    np.testing.assert_allclose(to_numpy(outputs), full, atol=1e-4, rtol=1e-4)
    seen[:, 4:, 1] = 0
    hidden = to_numpy(backbone.hidden_states_of(backbone(inputs)))
    np.testing.assert_allclose(hidden[:, :4], full[:, :4], atol=1e-4)
    assert np.abs(hidden - full)[:, 4:].max() > 1e-2
    cache = {"cache": backbone.make_cache(2, 8), "cache_update_index": 0}
    outputs, _ = backbone({**inputs, **cache})
    np.testing.assert_allclose(
        to_numpy(backbone.hidden_states_of(outputs)), hidden, atol=1e-4
    )


@every_encoder_decoder
def test_entries_across_are_written_once(family):
    backbone, _ = family.pair
    cache = backbone.make_cache(2, LENGTH)
    assert len(cache) == 2 * len(backbone.blocks)
    inputs = {"decoder_token_ids": TOKENS[:, :3], "cache_update_index": 0}
    _, read = backbone({**inputs, **family.source, "cache": cache})
    inputs = {"decoder_token_ids": TOKENS[:, 3:4], "cache_update_index": 3}
    _, after = backbone({**inputs, "cache": read})
    across = 0
    for empty, before, now in zip(cache, read, after):
        for x, y, z in zip(empty, before, now):
            if hasattr(x, "mask"):
                across += 1
                # In the length of what was read, and not of the text.
                assert (x.length, y.length) == (0, family.read_length)
                np.testing.assert_array_equal(
                    to_numpy(y.stored), to_numpy(z.stored)
                )
            else:
                assert x.shape[2] == LENGTH
                assert np.abs(to_numpy(y) - to_numpy(z)).max() > 1e-3
    assert across == 2 * len(backbone.blocks)


@every_encoder_decoder
def test_rows_stand_at_places_of_their_own(family):
    backbone, _ = family.pair
    _, cache = backbone(
        {
            **family.source,
            "decoder_token_ids": TOKENS,
            "cache": backbone.make_cache(2, LENGTH),
            "cache_update_index": 0,
        }
    )
    index = np.array([3, 6])
    outputs, _ = backbone(
        {
            "decoder_token_ids": TOKENS[[0, 1], index][:, None],
            "cache": cache,
            "cache_update_index": index,
        }
    )
    np.testing.assert_allclose(
        to_numpy(backbone.hidden_states_of(outputs))[:, 0],
        full_forward(backbone)[[0, 1], index],
        atol=1e-4,
        rtol=1e-4,
    )


def test_windows():
    """Upstream's see one position more, which parity is for."""
    (family,) = (x for x in ENCODER_DECODERS if x.name == "t5gemma")
    config = dict(family.config)
    narrow = family.backbone(sliding_window=3)
    full = assert_sound(narrow)
    # It sees less than a window that is longer than the text.
    wide = family.ours("Backbone")(**config)
    wide.set_weights(narrow.get_weights())
    assert np.abs(full_forward(wide) - full).max() > 1e-2
    cache = narrow.make_cache(2, 512, policy="rotating")
    shapes = [x.stored.shape[2] for x, _ in cache if hasattr(x, "stored")]
    assert max(shapes) < 512


@every_encoder_decoder
def test_eight_bits(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy", cache_policy="int8")
    cache = lm.backbone.make_cache(2, LENGTH, policy="int8")
    hidden_states, cache = lm.run_backbone(TOKENS, cache, 0, **family.source)
    full = full_forward(lm.backbone)
    error = np.abs(to_numpy(hidden_states) - full).max()
    assert 0 < error < 0.2 * np.abs(full).max()


# === Generating ===


@every_encoder_decoder
def test_greedy(family):
    prompts = prompts_for(family)
    lm, upstream = family.lm_pair
    for x in (lm, upstream):
        x.compile(sampler="greedy", **XLA)
    generated = lm.generate(prompts, stop_token_ids=None)
    expected = upstream.generate(prompts, stop_token_ids=None)
    for name, x in expected.items():
        np.testing.assert_array_equal(generated[name], ops.convert_to_numpy(x))
    # A model that says one thing over and over would say little.
    is_new = prompts["decoder_padding_mask"] == 0
    assert len(np.unique(generated["decoder_token_ids"][is_new])) > 2
    assert_greedy_after(prompts, generated, lm)
    # Rows together are what they are alone.
    for row in range(2):
        alone = {name: x[row : row + 1] for name, x in prompts.items()}
        np.testing.assert_array_equal(
            lm.generate(alone, stop_token_ids=None)["decoder_token_ids"][0],
            generated["decoder_token_ids"][row],
        )
    # They end with a stop token each.
    stop = int(generated["decoder_token_ids"][0, 6])
    ended, expected = (
        x.generate(prompts, stop_token_ids=[stop]) for x in (lm, upstream)
    )
    mask = ops.convert_to_numpy(expected["decoder_padding_mask"])
    if family.prefix == "Moonshine":
        assert mask.all()  # Upstream's never end.
        is_end = (generated["decoder_token_ids"] == stop) & is_new
        mask = np.cumsum(is_end, axis=1) - is_end == 0
    np.testing.assert_array_equal(ended["decoder_padding_mask"], mask)
    np.testing.assert_array_equal(
        ended["decoder_token_ids"][mask],
        ops.convert_to_numpy(expected["decoder_token_ids"])[mask],
    )


@every_encoder_decoder
def test_beams(family):
    lm, upstream = family.lm_pair
    # Upstream's T5Gemma does not repeat what was read for each beam.
    rows = 1 if family.prefix.startswith("T5Gemma") else 2
    prompts = {name: x[:rows] for name, x in prompts_for(family).items()}
    for x in (lm, upstream):
        x.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    generated, expected = (
        x.generate(prompts, stop_token_ids=None) for x in (lm, upstream)
    )
    np.testing.assert_array_equal(
        ops.convert_to_numpy(generated["decoder_token_ids"]),
        ops.convert_to_numpy(expected["decoder_token_ids"]),
    )


@every_encoder_decoder
def test_text(family):
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    backbone = family.backbone(vocabulary_size=size)
    lm = family.task(backbone, preprocessor)
    upstream = family.upstream_task(
        family.upstream_backbone(backbone, vocabulary_size=size), preprocessor
    )
    for x in (lm, upstream):
        x.compile(sampler="greedy")
    for prompt in prompts_of(family):
        before = copy.deepcopy(prompt)
        generated = lm.generate(prompt)
        # Which upstream's changes.
        keras.tree.map_structure(np.testing.assert_array_equal, prompt, before)
        assert generated == upstream.generate(prompt)
    assert lm.generate(prompt, max_length=9) == upstream.generate(
        prompt, max_length=9
    )
    # The same with more to say, one by one, and piece by piece.
    expected = lm.generate(prompt, max_new_tokens=5, strip_prompt=True)
    prompts = prompts_with_source(prompt, backbone.roles)[0]
    found = dict(lm.generate_many(prompts, 5, strip_prompt=True, batch_size=1))
    assert [found[i] for i in range(2)] == expected
    # A tokenizer may begin a whole text with a space.
    pieces = [list(lm.stream(x, max_new_tokens=5)) for x in prompts]
    assert ["".join(x).strip() for x in pieces] == [x.strip() for x in expected]
    assert max(map(len, pieces)) <= 6


@every_encoder_decoder
def test_options(family):
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    prompts = prompts_for(family)
    whole = lm.generate(prompts, stop_token_ids=None)["decoder_token_ids"]
    expected = [row[n : n + 4] for n, row in zip(GIVEN, whole)]
    given = dict(max_new_tokens=4, stop_token_ids=None)
    found = lm.generate(prompts, **given, return_dict=True, return_logprobs=1)
    for row, tokens in zip(found, expected):
        np.testing.assert_array_equal(row["token_ids"], tokens)
        assert row["finish_reason"] == "length"
        assert row["logprobs"][0]["token_id"] == tokens[0]
    arrays = lm.generate(prompts, **given)
    np.testing.assert_array_equal(arrays["decoder_token_ids"][1], whole[1, :9])
    np.testing.assert_array_equal(
        arrays["decoder_padding_mask"].sum(axis=1), np.add(GIVEN, 4)
    )
    other = lm.generate(
        prompts, **given, logit_bias={int(expected[0][0]): -1e9}
    )
    assert other["decoder_token_ids"][0, GIVEN[0]] != expected[0][0]


@every_encoder_decoder
def test_the_encoder_runs_once(family, monkeypatch):
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy", run_eagerly=True)
    calls = []
    for block in (*lm.backbone.encoder_blocks, *lm.backbone.blocks):
        call = block.call

        def counted(*args, call=call, name=block.name, **kwargs):
            calls.append(name)
            return call(*args, **kwargs)

        monkeypatch.setattr(block, "call", counted)
    lm.generate(prompts_for(family), stop_token_ids=None)
    for block in lm.backbone.encoder_blocks:
        assert calls.count(block.name) == 1
    # One step at least for each token of the row that is longer.
    for block in lm.backbone.blocks:
        assert calls.count(block.name) > LENGTH - max(GIVEN)


@every_encoder_decoder
def test_methods_of_upstream(family):
    lm, upstream = family.lm_pair
    _, *ours = lm._build_cache(*_arguments(family, lm))
    _, *theirs = upstream._build_cache(*_arguments(family, upstream))
    logits = []
    for x, state in ((lm, ours), (upstream, theirs)):
        token = TOKENS[:, :1]
        if family.prefix.startswith("T5Gemma"):
            cache, (source, mask) = state
            step = x.call_decoder_with_cache(
                token, None, cache, 8, source, mask
            )
        elif family.prefix == "BLIP2":
            source, mask, _ = _arguments(family, x)
            text, across = state
            step = x.call_decoder_with_cache(
                token, source, mask, text, 8, across, None
            )
            whole = x.call_decoder(TOKENS, MASK, source, mask)
            logits.append(to_numpy(x.backbone.language_model.lm_head(whole)))
        elif family.prefix == "Moonshine":
            text, across, source, mask = state
            step = x.call_decoder_with_cache(
                source, mask, token, text, 8, across
            )
        else:
            source, text, across = state
            step = x.call_decoder_with_cache(
                source,
                family.source["encoder_padding_mask"],
                token,
                text,
                8,
                across,
                None,
            )
        logits.append(to_numpy(step[0]))
    for x, y in zip(logits, logits[len(logits) // 2 :]):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


def _arguments(family, lm):
    token_ids = np.pad(TOKENS, ((0, 0), (0, 8)))
    if family.prefix == "BLIP2":
        source = map(ops.convert_to_tensor, family.source.values())
        return *lm.call_encoder(*source), ops.convert_to_tensor(token_ids)
    arguments = [*family.source.values(), token_ids]
    if family.prefix.startswith(("T5Gemma", "Moonshine")):
        arguments.append(np.ones_like(token_ids))
    return [ops.convert_to_tensor(x) for x in arguments]


@on_one_backend("what is called is recorded")
@every_encoder_decoder
def test_what_a_subclass_says_is_called(family):
    prompts = prompts_for(family)
    called = []

    class Mine(family.ours(family.kind)):
        def call_encoder(self, *args, **kwargs):
            called.append("encoder")
            return super().call_encoder(*args, **kwargs)

        def call_decoder_with_cache(self, *args, **kwargs):
            called.append("decoder")
            return super().call_decoder_with_cache(*args, **kwargs)

    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    expected = lm.generate(prompts, stop_token_ids=None)
    mine = Mine(backbone=lm.backbone, preprocessor=None)
    mine.compile(sampler="greedy")
    generated = mine.generate(prompts, stop_token_ids=None)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(generated["decoder_token_ids"]),
        expected["decoder_token_ids"],
    )
    assert called.count("encoder") == 1
    assert called.count("decoder") > 8


@every_encoder_decoder
def test_training(family):
    """One step of gradient descent is upstream's."""
    ours = family.task(family.backbone())
    theirs = family.upstream_task(family.upstream_backbone(ours.backbone))
    inputs = family.inputs(TOKENS, padding_mask([8, 5], 8))
    targets = random_tokens(2, 8, seed=2)
    for lm in (ours, theirs):
        lm.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        lm.fit(inputs, targets, batch_size=2, epochs=1, verbose=0)
    for x, y in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(
            to_numpy(x.value), to_numpy(y.value), atol=1e-5, err_msg=x.path
        )


# === Surgery ===


def dense(layer):
    output = layer.output
    output = output[0] if isinstance(output, (tuple, list)) else output
    return keras.layers.Dense(output.shape[-1])


def mixing(layer):
    """It looks at neighbours, which only an encoder may."""
    output = layer.output
    output = output[0] if isinstance(output, (tuple, list)) else output
    return keras.layers.Conv1D(output.shape[-1], 3, padding="same")


def new(layer):
    """A block like another one, with weights of its own."""
    config = {**layer.get_config(), "name": f"new_{layer.name}"}
    return type(layer).from_config(config)


EDITS = {
    "encoder, inserted": lambda m: surgery.insert_after(m, "encoder.*", dense),
    "encoder, mixing": lambda m: surgery.insert_after(m, "encoder.-1", mixing),
    "encoder, a block": lambda m: surgery.insert_after(m, "encoder.0", new),
    "encoder, removed": lambda m: surgery.remove(m, "encoder.1"),
    "encoder, repeated": lambda m: surgery.repeat_blocks(m, "encoder.*"),
    "encoder, kept": lambda m: surgery.keep_blocks(m, "encoder.-2"),
    "between": lambda m: surgery.insert_after(m, "encoder_output", dense),
    "decoder, inserted": lambda m: surgery.insert_after(
        m, ["decoder.-1", "block.0.residual"], keras.layers.Dense(_width(m))
    ),
    "decoder, a block": lambda m: surgery.replace(m, "decoder.1", new),
    "decoder, removed": lambda m: surgery.remove(m, "decoder.0"),
    "decoder, repeated": lambda m: surgery.repeat_blocks(m, slice(None)),
    "decoder, heads": lambda m: surgery.ablate_heads(m, 0, [0, -1]),
    "decoder, a sink": lambda m: surgery.add_attention_sink(m, 1, initial=1.0),
    "both, tapped": lambda m: surgery.insert_before(
        surgery.tap(m, ["encoder.0", "decoder.0", "block.1.attention.weights"]),
        "decoder.0",
        keras.layers.Dense(_width(m)),
    ),
}


def _width(model):
    (site, *_) = surgery.select(model, "decoder.0")
    return site.shape[-1]


@every_encoder_decoder
@pytest.mark.parametrize("edit", divided(EDITS))
def test_edits(family, edit, tmp_path):
    backbone, _ = family.pair
    before = full_forward(backbone)
    edited = EDITS[edit](backbone)
    after = assert_sound(edited)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(full_forward(backbone), before)
    edited.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras")
    np.testing.assert_allclose(full_forward(loaded), after, atol=1e-5)
    assert len(loaded.encoder_blocks) == len(edited.encoder_blocks)
    assert loaded.taps == edited.taps


@every_encoder_decoder
def test_edits_show_in_generation(family):
    prompts = prompts_for(family)
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    before = lm.generate(prompts, stop_token_ids=None)["decoder_token_ids"]
    for where in ("encoder.0", "encoder_output", "decoder.1"):
        edited = surgery.insert_after(lm, where, keras.layers.Rescaling(-3.0))
        after = edited.generate(prompts, stop_token_ids=None)
        assert_greedy_after(prompts, after, edited)
        assert (after["decoder_token_ids"] != before).any(), where


@on_one_backend("what a name means is looked at")
@every_encoder_decoder
def test_selection(family):
    backbone, _ = family.pair
    for side, blocks in (
        ("encoder", backbone.encoder_blocks),
        ("decoder", backbone.blocks),
    ):
        for place in (0, 1, -1, -2):
            (site,) = surgery.select(backbone, f"{side}.{place}")
            assert site.layer is blocks[place]
            assert site.in_encoder == (side == "encoder")
        found = surgery.select(backbone, f"{side}.*")
        assert [x.layer for x in found] == blocks
    with pytest.raises(ValueError, match="selects nothing"):
        surgery.select(backbone, "encoder.2")


def test_the_embeddings_of_the_encoder():
    """Upstream's BART calls those of the decoder when it generates."""
    prompts = prompts_for(ENCODER_DECODERS[0])
    lm, _ = ENCODER_DECODERS[0].lm_pair
    lm.compile(sampler="greedy")
    edited = surgery.insert_after(
        lm, "encoder_embeddings_add", keras.layers.Dense(32)
    )
    generated = edited.generate(prompts, stop_token_ids=None)
    assert_greedy_after(prompts, generated, edited)
    before = lm.generate(prompts, stop_token_ids=None)
    assert (generated["decoder_token_ids"] != before["decoder_token_ids"]).any()


@every_encoder_decoder
@pytest.mark.parametrize("side", ("encoder", "decoder"))
def test_control_vectors(family, side):
    prompts = prompts_for(family)
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    (site, *_) = surgery.select(lm, f"{side}.1")
    hint = family.prefix.lower()
    direction = np.random.default_rng(0).normal(size=site.shape[-1])
    vector = surgery.ControlVector({1: direction}, model_hint=hint)
    steered = vector.apply(lm, strength=4.0, side=side)
    before, after = map(full_forward, (lm.backbone, steered.backbone))
    assert np.abs(after - before).max() > 1e-2
    assert_sound(steered.backbone)
    generated = steered.generate(prompts, stop_token_ids=None)
    assert_greedy_after(prompts, generated, steered)
    steered.backbone.get_layer("control_vector").strength.assign(0.0)
    np.testing.assert_allclose(
        full_forward(steered.backbone), before, atol=1e-5
    )


# === Bad input ===


def bad_calls(family):
    """Pairs of what a backbone refuses and how it says so."""
    backbone, _ = family.pair
    text = {"decoder_token_ids": TOKENS}
    empty = {"cache": backbone.make_cache(2, 8), "cache_update_index": 0}
    _, cache = backbone({**text, **family.source, **empty})
    read = {"cache": cache, "cache_update_index": 0}
    sequence = to_numpy(encoded(backbone, family.source)["encoder_sequence"])
    name, mask_name, *beside = family.source
    source, mask, *_ = family.source.values()
    length, read_length = source.shape[1], family.read_length
    rank = source.ndim
    yield text, f"`{name}` or `encoder_sequence`.*neither"
    yield {**text, **empty}, r"first call with a `cache`.*, 0, .*nothing"
    yield (
        {**text, name: source, "encoder_sequence": sequence},
        "which it returned before. Received both",
    )
    yield {**text, name: source[:1]}, rf"`{name}`.*batch=2.*\(1, {length}\b"
    yield (
        {**text, name: source[0]},
        rf"`{name}` to have rank {rank}.*\({length},",
    )
    yield (
        {**text, "encoder_sequence": sequence[:, :, :-1]},
        r"`encoder_sequence`.*hidden_dim=32.*\(2, \d+, 31\)",
    )
    yield (
        {**text, name: source, mask_name: mask[:, :6]},
        rf"`{mask_name}`.*encoder_length={length}.*\(2, 6\)",
    )
    yield (
        {**text, **read, name: source[:, : length // 2]},
        rf"of the length that `cache` has.*, {read_length}\."
        rf".*\(2, {length // 2}\b",
    )
    yield (
        {**text, **read, mask_name: mask},
        f"`{mask_name}` with .*neither",
    )
    yield {**text, name: source[:, :0]}, r"at least one token per row.*\(2, 0"
    yield {**family.source}, "no 'decoder_token_ids'"
    across = backbone.cache_encoded.index(True)
    step = {"decoder_token_ids": TOKENS[:, :1], "cache_update_index": 7}
    for change, message in (
        (lambda x: x.stored, rf"`cache\[{across}\]\[0\]`"),
        (
            lambda x: x._replace(stored=x.stored[:1], mask=x.mask[:1]),
            rf"`cache\[{across}\]\[0\]`.*batch=2.*\(1, ",
        ),
        (
            lambda x: x._replace(stored=x.stored[:, :, 1:]),
            rf"`cache\[{across}\]\[0\].mask`.*encoder_length={read_length - 1}"
            rf".*1, {read_length}\)",
        ),
        (
            lambda x: x._replace(
                stored=x.stored[:, :, 1:], mask=x.mask[..., 1:]
            ),
            rf"of one text that .* \[{read_length - 1}, {read_length}\]",
        ),
    ):
        pairs = list(cache)
        pairs[across] = change(pairs[across][0]), pairs[across][1]
        yield {**step, "cache": tuple(pairs)}, message
    pairs = cache[across], *cache[1:across], cache[0], *cache[across + 1 :]
    yield {**step, "cache": pairs}, r"`cache\[0\]\[0\]`.*"
    yield (
        {**text, **family.source, "token_ids": TOKENS},
        "unknown key: 'token_ids'",
    )
    if not beside:
        return
    for instead in ({}, {"encoder_sequence": sequence}):
        yield (
            {**text, **instead, "images": IMAGES},
            "`images` with `encoder_token_ids`.*no such text",
        )
    for images in (IMAGES[:1], IMAGES[:, :8], IMAGES[0]):
        yield (
            {**text, **family.source, "images": images},
            r"`images`.*batch=2, height=16, width=16, channels=3",
        )


@every_encoder_decoder
def test_bad_calls(family):
    backbone, _ = family.pair
    for inputs, message in bad_calls(family):
        with pytest.raises(ValueError, match=message):
            backbone(inputs)


def test_positions_of_the_encoder():
    backbone, _ = ENCODER_DECODERS[0].pair
    with pytest.raises(ValueError, match=r"at most the 64 .*\(2, 65\)"):
        backbone(
            {
                "decoder_token_ids": TOKENS,
                "encoder_token_ids": random_tokens(2, 65),
            }
        )


@every_encoder_decoder
def test_bad_prompts(family):
    prompts = prompts_for(family)
    lm, _ = family.lm_pair
    lm.compile(sampler="greedy")
    name, mask_name, *beside = family.source
    source, mask, *_ = family.source.values()
    length = source.shape[1]
    changes = [
        ({name: None}, "what the encoder is to read"),
        ({name: source[:1]}, rf"batch of 2 prompts.*\(1, {length}\b"),
        ({mask_name: mask[:, :3]}, rf"\(2, {length}\b.* and \(2, 3\)"),
        ({mask_name: 0 * mask}, "none in row 0"),
        ({"decoder_padding_mask": 0 * mask}, rf"\(2, 16\) and \(2, {length}\)"),
    ]
    if beside:
        changes += [({"images": IMAGES[:1]}, r"`images` of shape \(2, 16, ")]
    if family.source is not SOUND:
        changes += [({name: source + 100}, "from 0 to 99, the vocabulary")]
    else:
        changes += [
            ({name: source[:, :, 0]}, r"\(batch, encoder_length, 1\)"),
            ({name: source.astype("int16")}, "dtype int16"),
        ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            lm.generate({**prompts, **change}, stop_token_ids=None)
    for further, message in (
        ({"assistant_model": lm}, "no `assistant_model`"),
        ({"prefix": [1]}, "no `prefix`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"banana": 1}, "banana"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            lm.generate(prompts, stop_token_ids=None, **further)
    with pytest.raises(ValueError, match="`preprocessor`"):
        lm.stream("the fox")
    with pytest.raises(ValueError, match="to be a dictionary of .*'the fox'"):
        list(lm.generate_many(["the fox"], stop_token_ids=None))
    for method in ("chat", "score"):
        with pytest.raises(ValueError, match="without an encoder"):
            getattr(lm, method)("the fox")
    with pytest.raises(ValueError, match="without an encoder, whose prompts"):
        surgery.ControlVector.train(lm, ["the fox"], ["the dog"])
    with pytest.raises(ValueError, match="keras_hub stack their caches"):
        lm._joined(np.zeros((2, 2, 2, 8, 4, 8)), ())
