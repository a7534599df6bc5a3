"""The loops of the backends: what they compile, copy, and keep up to date."""

import math
import re
import shutil

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

from keras_nlp_cache import surgery
from keras_nlp_cache.generate import loops
from keras_nlp_cache.generate.loops.generation import FEWEST_SLOTS
from keras_nlp_cache.generate.loops.generation import Loop
from keras_nlp_cache.generate.loops.generation import slots_for
from tests.families import assert_greedy
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import randomize
from tests.families import to_numpy
from tests.families import XLA

BACKEND = keras.config.backend()
LLAMA = next(x for x in FAMILIES if x.name == "llama")


def generate(lm, lengths, max_length, stop_token_ids=None):
    """Tokens after random prompts of some lengths."""
    mask = padding_mask(lengths, max_length)
    inputs = {
        "token_ids": random_tokens(len(lengths), max_length) * mask,
        "padding_mask": mask,
    }
    return lm.generate(inputs, stop_token_ids=stop_token_ids)["token_ids"]


def greedy_lm(family, **kwargs):
    """A task that no other test compiled anything for."""
    lm = family.task(backbone=family.backbone(**kwargs), preprocessor=None)
    lm.compile(sampler="greedy", **XLA)
    return lm


def optimized_hlo(loop, generation):
    """What XLA makes of a decode loop, as text."""
    arguments = (
        loop._bounds(len(generation.token_ids), 8, ()),
        *loop._options(None),
    )
    rows = len(generation.token_ids)
    if BACKEND == "jax":
        lowered = loop._compiled_decode.lower(
            loop._weights(rows), [], generation, *arguments
        )
        return lowered.compile().as_text()
    import tensorflow as tf

    small, *arguments = keras.tree.map_structure(
        lambda x: tf.convert_to_tensor(x) if hasattr(x, "dtype") else x,
        (generation._replace(cache=()), *arguments),
    )
    return loop._compiled_decode.experimental_get_compiler_ir(
        loop._packed(rows), generation.cache, small, *arguments
    )(stage="optimized_hlo")


def test_prompts_of_all_lengths_compile_twice_per_cache_size():
    lm = greedy_lm(LLAMA)
    loop = lm.generation_loop
    rng = np.random.default_rng(0)
    limits = rng.permutation(np.arange(200, 300, 5))
    for length, max_length in zip(range(3, 183, 9), limits):
        # A stop token that comes soon, for the test to be quick.
        generate(lm, [length], int(max_length), stop_token_ids=range(100))
    assert lm.generation_loop is loop
    assert len({slots_for(int(x)) for x in limits}) == 2
    assert 0 < loop.compilations <= 4
    before = loop.compilations
    generate(lm, [11], 222, stop_token_ids=range(100))
    assert loop.compilations == before


@pytest.mark.skipif(BACKEND != "jax", reason="counts what JAX compiles")
def test_all_that_jax_compiles_is_counted():
    import jax

    lm = greedy_lm(LLAMA)
    generate(lm, [5], 20)
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length in range(3, 60, 7):
            generate(lm, [length], length + 20)
        assert compiled == []
        generate(lm, [5, 6], 20)
        assert len(compiled) == lm.generation_loop.compilations - 2
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="what the compiler leaves on TensorFlow"
)
def test_memory_is_given_back_after_compilations(monkeypatch):
    from keras_nlp_cache.generate.loops import tensorflow_loop

    tensorflow_loop.give_back_free_memory()
    compiled = []
    monkeypatch.setattr(
        tensorflow_loop, "give_back_free_memory", lambda: compiled.append(1)
    )
    lm = greedy_lm(LLAMA)
    for length in (5, 7):
        generate(lm, [length], 20)
        assert len(compiled) == lm.generation_loop.compilations == 2


@in_turn("lengths", [[1], [33], [45, 38]])
def test_prompts_of_several_chunks(family, lengths):
    lm = greedy_lm(family)
    loop = lm.generation_loop
    tokens = generate(lm, lengths, 50)
    assert loop.chunk < 45 or BACKEND == "torch"
    if len(lengths) == 1:
        assert_greedy(lm, tokens, lengths[0])
    else:
        assert_greedy(lm, tokens[:1], 45)
        assert_greedy(lm, tokens[1:], 38)


def test_a_last_chunk_that_does_not_fit():
    """With 40 positions, the second chunk of 32 has to overlap the first."""
    lm = greedy_lm(FAMILIES[0], max_sequence_length=40)
    assert_greedy(lm, generate(lm, [38], 40), 38)
    with pytest.raises(ValueError, match="at most the 40 positions"):
        generate(lm, [38], 41)


@deep_families
def test_caches_of_several_blocks(family):
    """Attention over more slots than are read at a time."""
    learned = "max_sequence_length" in dict(family.config)
    sizes = {"max_sequence_length": 1024} if learned else {}
    lm = greedy_lm(family, **sizes)
    tokens = random_tokens(2, 600)
    loop = lm.generation_loop
    generation = loop.prefill(tokens[:, :508], np.ones((2, 508)), 1024)
    generation = loop.decode(generation, 520)
    generated = ops.convert_to_numpy(generation.token_ids)
    np.testing.assert_array_equal(generated[:, :508], tokens[:, :508])
    assert not generated[:, 520:].any()
    assert_greedy(lm, generated[:, :520], 508)


def test_generation_ends_when_all_rows_are_done():
    lm = greedy_lm(LLAMA)
    free = generate(lm, [4, 6], 40)
    # What the second row says fifth, and the first at some time or never.
    stop = int(free[1, 10])
    expected = [
        (list(row[n:]).index(stop) if stop in row[n:] else 39 - n) + n
        for row, n in zip(free, (4, 6))
    ]
    loop = lm.generation_loop
    prompts = random_tokens(2, 40)
    given = padding_mask([4, 6], 40)
    generation = loop.prefill(prompts * given, given, FEWEST_SLOTS)
    generation = loop.decode(generation, 40, [stop])
    assert ops.convert_to_numpy(generation.index).tolist() == expected


def changes():
    def assign(lm):
        randomize(lm.backbone, seed=1)

    def lora(lm):
        lm.backbone.enable_lora(4)
        for weight in lm.backbone.trainable_variables:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))

    def fit(lm):
        x = {
            "token_ids": random_tokens(2, 8),
            "padding_mask": np.ones((2, 8), "int32"),
        }
        lm.compile(sampler="greedy", optimizer=keras.optimizers.SGD(10.0))
        generate(lm, [5], 20)
        lm.fit(x, random_tokens(2, 8), verbose=0)

    return [assign, lora, fit]


@pytest.mark.parametrize("change", changes(), ids=lambda x: x.__name__)
def test_changed_weights_are_seen(change):
    lm = greedy_lm(LLAMA)
    before = generate(lm, [5], 20)
    change(lm)
    after = generate(lm, [5], 20)
    assert (before != after).any()
    assert_greedy(lm, after, 5)


def test_quantized_weights_are_seen():
    lm = greedy_lm(LLAMA)
    generate(lm, [5], 20)
    loop = lm.generation_loop
    lm.quantize("int8")
    after = generate(lm, [5], 20)
    assert lm.generation_loop is not loop
    lm.compile(sampler="greedy", run_eagerly=True)
    np.testing.assert_array_equal(after, generate(lm, [5], 20))


def test_new_weights_compile_nothing(tmp_path):
    lm = greedy_lm(LLAMA)
    other = greedy_lm(LLAMA)
    randomize(other.backbone, seed=2)
    other.save_weights(tmp_path / "other.weights.h5")
    before = generate(lm, [5], 20)
    loop, compiled = lm.generation_loop, lm.generation_loop.compilations
    lm.load_weights(tmp_path / "other.weights.h5")
    after = generate(lm, [5], 20)
    assert (before != after).any()
    np.testing.assert_array_equal(after, generate(other, [5], 20))
    assert lm.generation_loop is loop and loop.compilations == compiled


def test_how_a_model_was_compiled_is_respected():
    lm = greedy_lm(LLAMA)
    expected = generate(lm, [5, 3], 12)
    compiled = lm.generation_loop
    assert lm.generation_loop is compiled
    lm.compile(sampler="greedy", run_eagerly=True)
    assert type(lm.generation_loop).__name__ in ("Loop", "EagerTorchLoop")
    np.testing.assert_array_equal(generate(lm, [5, 3], 12), expected)
    assert lm.generation_loop.compilations == 0
    lm.compile(sampler="greedy", jit_compile=False)
    assert type(lm.generation_loop) is type(compiled) is not Loop
    assert lm.generation_loop is not compiled
    np.testing.assert_array_equal(generate(lm, [5, 3], 12), expected)


@pytest.mark.skipif(BACKEND != "torch", reason="Inductor is PyTorch's")
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
@deep_families
def test_inductor(family):
    lm = greedy_lm(family)
    lm.compile(sampler="greedy", jit_compile=True)
    for seed in (0, 2):
        randomize(lm.backbone, seed)  # Weights are seen, here too.
        assert_greedy(lm, generate(lm, [5], 20), 5)
    ((_, step),) = lm.generation_loop._captured.values()
    assert type(step).__name__ == "OptimizedModule"


@deep_families
def test_a_decode_step_does_not_copy_the_cache(family):
    lm = greedy_lm(family)
    loop = lm.generation_loop
    prompt = random_tokens(2, 5)
    generation = loop.prefill(prompt, np.ones_like(prompt), slots_for(40, 64))
    generation = loop.decode(generation, 6)
    shape = tuple(generation.cache[0][0].shape)
    given = [x for pair in generation.cache for x in pair]
    if BACKEND == "torch":
        generation = loop.decode(generation, 8)
        returned = [x for pair in generation.cache for x in pair]
        assert all(a is b for a, b in zip(given, returned))
        ((_, module),) = loop._captured.values()
        names = [str(x.target) for x in module.graph.nodes]
        # And into the tokens.
        assert names.count("aten.scatter_.src") == len(given) + 1
        shapes = [
            tuple(x.meta["val"].shape)
            for x in module.graph.nodes
            if str(x.target) in ("aten.scatter.src", "aten.clone.default")
        ]
        assert shape not in shapes
        if "gemma" not in family.name:
            # Gemma's kernels have their input in the middle: (heads, in, out).
            assert "aten.bmm.default" not in names
        return
    text = optimized_hlo(loop, generation)
    if BACKEND == "jax":
        loop.decode(generation, 8)
        assert all(x.is_deleted() for x in given)
    cache = "f32[" + ",".join(map(str, shape)) + "]"
    assert text.count("may-alias") >= len(given)
    lines = [x for x in text.splitlines() if f"= {cache}" in x]
    updates = [x for x in lines if "dynamic-update-slice" in x]
    assert len(updates) >= len(given)
    assert not [x for x in lines if " copy(" in x]


@pytest.mark.skipif(BACKEND == "torch", reason="reads what XLA compiled")
@deep_families
def test_a_decode_step_moves_no_weights(family):
    slots, config = 512, dict(family.config)
    sizes = {"hidden_dim": 256, "intermediate_dim": 512, "num_layers": 1}
    if "max_sequence_length" in config:
        sizes["max_sequence_length"] = slots
    if "head_dim" in config:
        slots, sizes["head_dim"] = 1024, 32
    lm = greedy_lm(family, **sizes)
    prompt = random_tokens(1, 5)
    generation = lm.generation_loop.prefill(prompt, np.ones_like(prompt), slots)
    text = optimized_hlo(lm.generation_loop, generation)
    keys = math.prod(generation.cache[0][0].shape)
    moved = []
    for computation in text.split("\n\n"):
        if re.match(r"%(fused|wrapped)", computation):
            continue  # Its instructions write nothing.
        for name, shape, operation in re.findall(
            r"%([\w.-]+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", computation
        ):
            if operation in ("parameter", "get-tuple-element", "bitcast"):
                continue
            size = math.prod(map(int, shape.split(",")))
            if size >= keys // 2 and "dynamic-update-slice" not in name:
                moved.append((name, size))
    if "gemma" in family.name:
        # Its query kernel, (heads, in, out), is transposed: in lies inside.
        block = lm.backbone.blocks[0]
        query = math.prod(block.attention.query_dense.kernel.shape)
        moved = [x for x in moved if x[1] != query]
        assert query < keys
    assert not moved


@pytest.mark.skipif(BACKEND != "tensorflow", reason="reads TensorFlow's XLA")
@deep_families
def test_one_row_is_multiplied_with_matrices_as_they_lie(family):
    lm = greedy_lm(family)
    prompt = random_tokens(1, 5)
    loop = lm.generation_loop
    generation = loop.prefill(prompt, np.ones_like(prompt), slots_for(40, 64))
    text = optimized_hlo(loop, generation)
    assert text.count(" dot(") > 6 * len(lm.backbone.blocks)
    # One loop with what makes the matrix, XLA adds up number by number.
    fused = [x for x in text.split("\n\n") if x.startswith("%fused")]
    dots = re.findall(
        r" dot\(%[\w.]+, %(?!param)[^)]*\).*op_name=\"(.*?)\"", "\n".join(fused)
    )
    if family.name.startswith("gemma"):
        # These kernels, (heads, in, out), are no matrices.
        dots = [x for x in dots if not re.search("/(query|key|value)", x)]
    assert dots == []


class Count(keras.layers.Layer):
    """Counts how often it is called."""

    def build(self, input_shape):
        self.calls = self.add_weight(initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="only TensorFlow keeps it in a loop"
)
def test_what_a_layer_remembers_is_kept():
    count = Count()
    lm = surgery.insert_after(LLAMA.lm_pair[0], 0, count)
    lm.compile(sampler="greedy", **XLA)
    prompt = random_tokens(1, 5)
    loop = lm.generation_loop
    generation = loop.prefill(prompt, np.ones_like(prompt), slots_for(40, 64))
    count.calls.assign(0)
    loop.decode(generation, 11)
    assert int(count.calls) == 6


def memory(cache):
    """Where a cache lies."""
    if BACKEND == "jax":
        return [x.unsafe_buffer_pointer() for x in tree.flatten(cache)]
    return [id(x) for x in tree.flatten(cache)]


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch reuses memory itself")
def test_a_cache_that_is_done_with_is_used_again():
    lm = greedy_lm(LLAMA)
    loop = lm.generation_loop
    expected = generate(lm, [5], 20)
    # Whatever is in it.
    spoilt = tree.map_structure(
        lambda x: to_numpy(x) * np.nan, loop._spare_caches[True]
    )
    loop.keep(loop.restore_cache(spoilt))
    where = memory(loop._spare_caches[True])
    np.testing.assert_array_equal(generate(lm, [5], 20), expected)
    assert memory(loop._spare_caches[True]) == where
    # One that is in use is not, nor one of another size.
    prompt = random_tokens(1, 5)
    generation = loop.prefill(prompt, np.ones_like(prompt), slots_for(20))
    assert memory(generation.cache) == where
    np.testing.assert_array_equal(generate(lm, [5], 20), expected)
    assert not set(memory(loop._spare_caches[True])) & set(where)
    generate(lm, [5, 3], 20)
    kept = loop._spare_caches
    assert {k: x[0][0].shape[0] for k, x in kept.items()} == {True: 1, False: 2}


@in_turn("run_eagerly", [False, True])
def test_a_cache_of_another_dtype(family, run_eagerly):
    lm = family.task(backbone=family.backbone(), preprocessor=None)
    lm.compile(
        sampler="greedy", cache_dtype="bfloat16", run_eagerly=run_eagerly
    )
    loop, prompt = lm.generation_loop, random_tokens(2, 5)
    generation = loop.prefill(prompt, np.ones_like(prompt), slots_for(40, 64))
    generation = loop.decode(generation, 40)
    for x in (x for pair in generation.cache for x in pair):
        assert keras.backend.standardize_dtype(x.dtype) == "bfloat16"
    # What is lost in rounding decides few tokens.
    tokens = to_numpy(generation.token_ids)[:, :40].astype("int32")
    logits = to_numpy(
        lm({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    )[:, 4:-1]
    chosen = np.take_along_axis(logits, tokens[:, 5:, None], axis=-1)[..., 0]
    scale = logits.std()
    assert (logits.max(axis=-1) - chosen).max() < 0.3 * scale
    with pytest.raises(ValueError, match="`cache_dtype`.*int8"):
        lm.compile(sampler="greedy", cache_dtype="int8")


def test_samplers_with_a_loop_of_their_own():
    lm = LLAMA.lm_pair[0]
    for sampler, known in {
        "greedy": True,
        "top_k": True,
        "top_p": True,
        "random": True,
        "beam": False,
        "contrastive": False,
    }.items():
        lm.compile(sampler=sampler)
        assert loops.sampling.supports(lm.sampler) is known
