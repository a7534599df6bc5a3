"""A decode step reads the experts that its tokens chose, and no others."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from keras_hub.src.models.gpt_oss import gpt_oss_decoder
from keras_hub.src.models.mixtral import mixtral_decoder
from keras_hub.src.models.qwen3_moe import qwen3_moe_decoder
from keras_hub.src.models.qwen_moe import qwen_moe_decoder

from keras_nlp_cache import models  # noqa: F401
from keras_nlp_cache.cache.access import Access
from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.experts import mixture
from keras_nlp_cache.experts.mixture import ExpertBank
from keras_nlp_cache.experts.mixture import SparseBlock
from keras_nlp_cache.generate.loops.access import loop_access
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.specializing import specialize_within
from tests.test_prefix_tuning import gradients

BACKEND = keras.config.backend()
HIDDEN = 8
EXPERTS = 16


KINDS = {
    "mixtral": mixtral_decoder.MixtralSparseMoeBlock,
    "qwen_moe": qwen_moe_decoder.QwenSparseMoeBlock,
    "qwen3_moe": qwen3_moe_decoder.Qwen3SparseMoeBlock,
    "gpt_oss": gpt_oss_decoder.GptOssSparseMoeBlock,
}
OWNED = pytest.mark.parametrize("owned", [False, True])
KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind, top_k=2, num_experts=EXPERTS, dtype=None):
    """Upstream's block with random weights, and its bank."""
    cls = KINDS[kind]
    kwargs = {
        "mixtral": dict(intermediate_dim=6),
        "qwen_moe": dict(
            moe_intermediate_dim=6,
            shared_expert_intermediate_dim=4,
            norm_top_k_prob=False,
        ),
        "qwen3_moe": dict(moe_intermediate_dim=6, norm_top_k_prob=True),
        "gpt_oss": dict(intermediate_dim=6),
    }[kind]
    block = cls(
        hidden_dim=HIDDEN,
        num_experts=num_experts,
        top_k=top_k,
        dtype=dtype,
        **kwargs,
    )
    block.build((None, None, HIDDEN))
    rng = np.random.default_rng(0)
    for variable in block.variables:
        if variable.dtype.startswith("float"):
            variable.assign(rng.normal(size=variable.shape, scale=0.5))
    name = "experts" if kind == "gpt_oss" else "expert_bank"
    return block, getattr(block, name)


def specialized(kind, **kwargs):
    block, bank = make(kind, **kwargs)
    specialize_within([block])
    assert isinstance(block, SparseBlock) and isinstance(bank, ExpertBank)
    return block, bank


def tokens(batch, length=1):
    rng = np.random.default_rng(batch + length)
    return rng.normal(size=(batch, length, HIDDEN)).astype("float32")


def call(block, x, cached=True, owned=False, **kwargs):
    how = loop_access() if owned else Access()
    entries = {0: LayerCache(key=0)} if cached else {}
    with accessing(how), block_call.calling(x, entries):
        return block(ops.convert_to_tensor(x), **kwargs)


def numpy(outputs):
    return [ops.convert_to_numpy(x) for x in outputs]


def choices(block, x):
    """The experts that upstream chooses, by token."""
    weighs = np.asarray(ops.convert_to_numpy(call(block, x, cached=False)[1]))
    return np.argsort(-weighs, axis=-1)[:, : block.top_k]


@OWNED
@KIND
@pytest.mark.parametrize("top_k", [1, 3])
def test_equal(kind, top_k, owned):
    block, _ = specialized(kind, top_k=top_k)
    for shape in [(1, 1), (3, 1), (1, 2)]:
        x = tokens(*shape)
        expected = numpy(call(block, x, cached=False))
        actual = numpy(call(block, x, owned=owned))
        for one, other in zip(actual, expected):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@OWNED
@KIND
def test_what_was_not_chosen_is_not_read(kind, owned):
    """Not a number times zero is none: upstream's result shows that it is."""
    block, bank = specialized(kind)
    x = tokens(3)
    x[1] = x[0]  # What several tokens choose is there once.
    expected = call(block, x, cached=False)[0]
    chosen = np.unique(choices(block, x))
    assert len(chosen) < 3 * block.top_k < EXPERTS
    for variable in bank.variables:
        value = np.array(variable)
        value[[i for i in range(EXPERTS) if i not in chosen]] = np.nan
        variable.assign(value)
    assert np.isnan(numpy(call(block, x, cached=False))[0]).all()
    actual = call(block, x, owned=owned)[0]
    np.testing.assert_allclose(*numpy([actual, expected]), atol=1e-5)


@OWNED
@KIND
def test_one_token_costs_what_its_experts_do(kind, owned):
    """By what the backend says of what it compiled or ran."""
    block, bank = specialized(kind, num_experts=64)
    per_expert = sum(int(np.prod(x.shape[1:])) for x in bank.variables)
    upstream = products(block, tokens(1), cached=False)
    actual = products(block, tokens(1), owned=owned)
    # Each weight is multiplied once, and there are a few other products.
    others = 3 * HIDDEN * 64
    assert upstream > 50 * per_expert
    assert actual < block.top_k * per_expert * 1.5 + others < upstream / 4


def products(block, x, **kwargs):
    """How many weights are multiplied with the only token there is."""
    if BACKEND == "torch":
        from torch.profiler import profile

        with profile(record_shapes=True) as seen:
            call(block, x, **kwargs)
        return sum(
            int(np.prod(event.input_shapes[1]))
            for event in seen.events()
            if event.name in ("aten::mm", "aten::bmm")
        )

    def function(x):
        return call(block, x, **kwargs)[0]

    if BACKEND == "jax":
        import jax

        compiled = jax.jit(function).lower(x).compile()
        # The body of a loop counts once: that it is run for each of the chosen
        # experts alone is what not being a number shows.
        return compiled.cost_analysis()["flops"] / 2
    import tensorflow as tf

    function = tf.function(function, autograph=False)
    graph = function.get_concrete_function(tf.constant(x)).graph
    return sum(
        max(int(np.prod(y.shape)) for y in operation.inputs)
        for operation in all_operations(graph)
        if operation.type in ("Einsum", "MatMul")
    )


def all_operations(graph):
    """The operations of a TensorFlow graph, and of loops in it once."""
    for operation in graph.get_operations():
        yield operation
        if operation.type in ("While", "StatelessWhile"):
            name = operation.get_attr("body").name
            yield from all_operations(graph._get_function(name).graph)


@pytest.mark.skipif(BACKEND != "jax", reason="asks XLA through JAX")
def test_xla_copies_no_more_than_one_expert():
    import jax

    block, bank = specialized("qwen3_moe", num_experts=64)
    size = sum(4 * int(np.prod(x.shape)) for x in bank.variables)

    def accessed(**kwargs):
        compiled = jax.jit(lambda x: call(block, x, **kwargs)[0])
        compiled = compiled.lower(tokens(1)).compile()
        return compiled.cost_analysis()["bytes accessed"]

    assert accessed(cached=False) > size
    assert accessed(owned=True) < size / 2


@pytest.mark.skipif(BACKEND != "tensorflow", reason="asks TensorFlow")
def test_an_expert_is_gathered_and_xla_slices_it():
    """Where a `tf.slice()` begins is looked for in what `top_k()` returns."""
    import tensorflow as tf

    block, bank = specialized("qwen3_moe", num_experts=64)
    shapes = {tuple(x.shape) for x in bank.variables}
    function = tf.function(
        lambda x: call(block, x, owned=True)[0], jit_compile=True
    )
    x = tf.constant(tokens(1))
    sliced = [
        operation
        for operation in all_operations(function.get_concrete_function(x).graph)
        if operation.type in ("Slice", "StridedSlice")
        and tuple(operation.inputs[0].shape) in shapes
    ]
    assert sliced == []
    program = function.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    assert " gather(" not in program and "dynamic-slice" in program


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX always is")
@OWNED
def test_compiled(owned):
    import tensorflow as tf

    block, _ = specialized("gpt_oss")
    for batch in (1, 2):
        x = tokens(batch)
        expected = call(block, x, cached=False)[0]
        function = tf.function(
            lambda x: call(block, x, owned=owned)[0], jit_compile=True
        )
        np.testing.assert_allclose(*numpy([function(x), expected]), atol=1e-5)


@OWNED
@KIND
def test_elsewhere_it_is_upstreams(kind, owned):
    """Without a cache, in training and for many tokens."""
    upstream, _ = make(kind)
    block, _ = specialized(kind)
    cases = [(tokens(1), False, {}), (tokens(5, 7), True, {})]
    if kind != "gpt_oss":
        cases.append((tokens(1), True, {"training": True}))
    for x, cached, kwargs in cases:
        expected = numpy(upstream(ops.convert_to_tensor(x), **kwargs))
        actual = numpy(call(block, x, cached=cached, owned=owned, **kwargs))
        for one, other in zip(actual, expected):
            np.testing.assert_array_equal(one, other)
        assert len(block.losses) == len(upstream.losses)
        np.testing.assert_array_equal(
            numpy(block.losses), numpy(upstream.losses)
        )


@KIND
def test_gradients_pass_through_a_cached_call(kind):
    block, bank = specialized(kind)
    x = tokens(2)
    weights = [np.array(variable) for variable in block.trainable_variables]

    def derived(**kwargs):
        def loss(values):
            mapping = list(zip(block.trainable_variables, values))
            with keras.StatelessScope(state_mapping=mapping):
                return ops.sum(ops.square(call(block, x, **kwargs)[0]))

        return numpy(gradients(loss, weights, "graph"))

    expected, actual = derived(cached=False), derived()
    for one, other in zip(actual, expected):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
    places = [id(variable) for variable in block.trainable_variables]
    assert np.any(actual[places.index(id(bank.trainable_variables[0]))])


@OWNED
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_low_precision(dtype, owned):
    """Which experts are chosen is upstream's choice, rounded as it rounds."""
    for kind in ("mixtral", "gpt_oss"):
        block, _ = specialized(kind, dtype=dtype)
        x = tokens(2)
        expected = call(block, x, cached=False)[0]
        actual = call(block, x, owned=owned)[0]
        assert actual.dtype == expected.dtype
        actual, expected = numpy(
            ops.cast(y, "float32") for y in (actual, expected)
        )
        np.testing.assert_allclose(actual, expected, atol=0.03, rtol=0.03)


@OWNED
@pytest.mark.parametrize("kind", ["qwen_moe", "gpt_oss"])
def test_quantized(kind, owned):
    """Upstream's routers are quantized, its experts are not."""
    block, _ = specialized(kind)
    for layer in block._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            layer.quantize("int8")
    x = tokens(2)
    expected = call(block, x, cached=False)[0]
    actual = call(block, x, owned=owned)[0]
    np.testing.assert_allclose(*numpy([actual, expected]), atol=1e-5)


@OWNED
def test_what_is_set_later_counts(owned):
    block, bank = specialized("qwen3_moe")
    before = numpy(call(block, tokens(1), owned=owned))[0]
    bank.activation = keras.activations.relu
    expected = numpy(call(block, tokens(1), cached=False))[0]
    actual = numpy(call(block, tokens(1), owned=owned))[0]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(actual - before).max() > 1e-3


def test_what_is_no_longer_used_goes():
    block, bank = specialized("gpt_oss")
    call(block, tokens(1))
    gone = weakref.ref(bank)
    assert gone() in mixture._traces
    del block, bank
    gc.collect()
    assert gone() is None


@KIND
def test_an_accelerator_does_not_wait_for_the_host(kind, monkeypatch):
    """It would to see what was chosen. What was chosen is copied instead."""
    monkeypatch.setattr(
        type(loop_access()), "on_an_accelerator", lambda self: True
    )
    loops = []
    monkeypatch.setattr(ops, "fori_loop", lambda *_: loops.append(1))
    block, _ = specialized(kind)
    expected = call(block, tokens(2), cached=False)[0]
    actual = call(block, tokens(2), owned=True)[0]
    np.testing.assert_allclose(*numpy([actual, expected]), atol=1e-5)
    assert not loops


@pytest.mark.skipif(BACKEND == "torch", reason="knows all sizes")
def test_unknown_batch_size():
    block, _ = specialized("qwen3_moe")
    x = tokens(2)
    expected = numpy(call(block, x, cached=False))[0]

    def function(x):
        return call(block, x)[0]

    if BACKEND == "jax":
        import jax

        (batch,) = jax.export.symbolic_shape("batch")
        spec = jax.ShapeDtypeStruct((batch, 1, HIDDEN), "float32")
        # Upstream's own code, for which Keras asks for an int.
        function = jax.export.export(jax.jit(function))(spec).call
    else:
        import tensorflow as tf

        spec = tf.TensorSpec((None, 1, HIDDEN), "float32")
        function = tf.function(function, [spec], autograph=False)
    np.testing.assert_allclose(numpy([function(x)])[0], expected, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="captures PyTorch's operators")
@KIND
def test_captured_steps_look_when_they_run(kind):
    """What is captured of one token is right for one that chooses others."""
    import torch

    from keras_nlp_cache.generate.loops.torch_capture import capture

    block, _ = specialized(kind)
    function = capture(
        lambda x: call(block, x, owned=True)[0], torch.tensor(tokens(2))
    )
    names = [str(node.target) for node in function.graph.nodes]
    assert any("expert_product" in name for name in names)
    chosen = set()
    for length in range(4):
        x = tokens(2) + length
        chosen.add(tuple(np.unique(choices(block, x))))
        expected = call(block, x, cached=False)[0]
        actual = function(torch.tensor(x))
        np.testing.assert_allclose(*numpy([actual, expected]), atol=1e-5)
    assert len(chosen) > 1
