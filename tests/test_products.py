"""Products of our own: their numbers, and what they follow."""

import concurrent.futures
import importlib.util
import sys

import keras
import numpy as np
import pytest

from keras_nlp_cache.generate import loops
from keras_nlp_cache.kernels import availability
from keras_nlp_cache.kernels import description
from keras_nlp_cache.models import Llama3Backbone
from keras_nlp_cache.models import Llama3CausalLM
from keras_nlp_cache.products import choice
from keras_nlp_cache.products import multiplying
from keras_nlp_cache.products.finding import find_weights
from keras_nlp_cache.products.logits import logits
from keras_nlp_cache.products.packing import packed_now
from tests.families import compiled_as_loops
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import randomize
from tests.families import to_numpy
from tests.families import XLA

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba"
)
WEIGHTS_ONLY = keras.quantizers.Int8QuantizationConfig(
    activation_quantizer=None
)
CHANNELS = keras.quantizers.Int4QuantizationConfig(block_size=None)
ROUNDED = keras.quantizers.Int4QuantizationConfig(
    block_size=None,
    activation_quantizer=keras.quantizers.AbsMaxQuantizer(axis=-1),
)
IN_GROUPS = keras.quantizers.Int4QuantizationConfig(block_size=32)
IN_ODD_GROUPS = keras.quantizers.Int4QuantizationConfig(block_size=7)
# What a product and Keras' own may differ by, in parts of the largest number.
MOST = 32
AS_MEASURED = choice.most_rows
EXACT, ROUNDING = 2e-6, {"bfloat16": 2**-6, "float16": 2**-10}


@pytest.fixture
def used(monkeypatch):
    """The dtypes that kernels of our own read, in the order of calls."""
    dtypes = []
    multiply = multiplying._multiply

    def noted(form, *args):
        dtypes.append(form.dtype)
        return multiply(form, *args)

    monkeypatch.setattr(multiplying, "_multiply", noted)
    return dtypes


@pytest.fixture(autouse=True)
def _wherever_they_can(monkeypatch):
    """Kernels of our own serve for all that they can, worth it or not."""
    monkeypatch.setattr(choice, "most_rows", lambda dtype: MOST)


@pytest.fixture
def without_our_own(monkeypatch):
    """A function: from when on the backend's products are to serve."""
    return lambda: monkeypatch.setattr(
        availability, "why_not", lambda: "a test"
    )


def multiplied(model, call, x):
    """What is computed with products of our own, of one compiled function."""
    weights = find_weights(model)
    arrays = packed_now(weights, 1)

    def function(x):
        with multiplying.multiplying_with(weights, arrays):
            return call(x)

    return to_numpy(compiled_as_loops(function)(x))


def check(model, call, x, expected, tolerance):
    expected = to_numpy(keras.ops.cast(expected, "float32"))
    actual = multiplied(model, call, x)
    assert actual.shape == expected.shape
    most = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance * most)


def inputs(*shape, dtype="float32"):
    x = np.random.default_rng(1).standard_normal(shape, dtype="float32")
    return keras.ops.convert_to_tensor(x, dtype)


@needs_numba
@pytest.mark.parametrize(
    "dtype, config, read, rows, depth, outputs",
    [
        ("float32", None, "float32", 1, 65, 127),
        ("float32", None, "float32", 7, 64, 129),
        ("float32", None, "float32", 32, 70, 700),
        ("float32", None, "float32", 13, 200, 131),
        ("bfloat16", None, "bfloat16", 1, 65, 127),
        ("bfloat16", None, "bfloat16", 18, 200, 33),
        ("mixed_bfloat16", None, "bfloat16", 5, 64, 128),
        ("float16", None, "float16", 6, 65, 128),
        ("float32", "int8", "int8", 1, 65, 127),
        ("bfloat16", "int8", "int8", 9, 64, 129),
        ("float32", "int8", "int8", 29, 200, 131),
        ("float32", WEIGHTS_ONLY, "int8", 6, 65, 127),
        ("float32", CHANNELS, "int4", 1, 65, 127),
        ("float32", ROUNDED, "int4", 3, 64, 128),
        ("float32", IN_GROUPS, "int4", 9, 100, 127),
        ("bfloat16", IN_GROUPS, "int4", 1, 64, 128),
        ("float32", IN_ODD_GROUPS, "int4", 2, 65, 127),
    ],
)
def test_dense(dtype, config, read, rows, depth, outputs, used):
    layer = keras.layers.Dense(
        outputs, dtype=dtype, bias_initializer="normal", activation="tanh"
    )
    model = keras.Sequential([keras.Input((depth,)), layer])
    if isinstance(config, str):
        model.quantize(config)
    elif config is not None:
        model.quantize(config=config)
    x = inputs(rows, depth, dtype=layer.compute_dtype)
    tolerance = ROUNDING.get(layer.compute_dtype, EXACT)
    check(model, layer, x, layer(x), tolerance)
    assert used == [read]


@needs_numba
@pytest.mark.parametrize(
    "config, read", [(None, []), ("int8", ["int8"]), (WEIGHTS_ONLY, [])]
)
def test_of_many_rows_integers_alone_are_ours(config, read, used, monkeypatch):
    monkeypatch.setattr(choice, "most_rows", AS_MEASURED)
    layer = keras.layers.Dense(131)
    model = keras.Sequential([keras.Input((64,)), layer])
    if isinstance(config, str):
        model.quantize(config)
    elif config is not None:
        model.quantize(config=config)
    x = inputs(130, 64)
    check(model, layer, x, layer(x), EXACT)
    assert used == read


@needs_numba
@pytest.mark.parametrize("config", ["int8", IN_GROUPS])
def test_rows_are_what_they_are_alone(config):
    layer = keras.layers.Dense(131)
    model = keras.Sequential([keras.Input((200,)), layer])
    if isinstance(config, str):
        model.quantize(config)
    else:
        model.quantize(config=config)
    x = inputs(15, 200)
    alone = [multiplied(model, layer, x[i : i + 1]) for i in range(15)]
    np.testing.assert_array_equal(
        multiplied(model, layer, x), np.concatenate(alone)
    )


@needs_numba
@pytest.mark.parametrize("rows, depth", [(1, 64), (7, 129), (21, 63), (8, 640)])
def test_integers_with_and_without_an_instruction(rows, depth):
    from keras_nlp_cache.products import integer_sums
    from keras_nlp_cache.products import kernels

    random = np.random.default_rng(0)
    w = random.integers(-128, 128, (33, depth), "int8")
    x = random.integers(-127, 128, (rows, depth), "int8")
    products = [kernels._of_integers_in_a_loop]
    if integer_sums.is_served():
        products.append(kernels._of_integers_in_vectors)
    for product in products:
        y = np.full((rows, 33), 7, "int32")
        product(w, x, y)
        np.testing.assert_array_equal(y, x.astype(int) @ w.astype(int).T)


@needs_numba
@pytest.mark.parametrize("config", [None, "int8", WEIGHTS_ONLY, IN_GROUPS])
@pytest.mark.parametrize(
    "equation, shape, outputs",
    [
        ("bqm,muh->bquh", (1, 3, 60), (None, 4, 33)),
        ("bquh,uhm->bqm", (2, 1, 4, 15), (None, 128)),
    ],
)
def test_einsums(config, equation, shape, outputs, used):
    layer = keras.layers.EinsumDense(equation, outputs)
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    if isinstance(config, str):
        model.quantize(config)
    elif config is not None:
        model.quantize(config=config)
    x = inputs(*shape)
    check(model, layer, x, layer(x), EXACT)
    assert len(used) == 1


@needs_numba
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config", [None, "int8", WEIGHTS_ONLY, CHANNELS, IN_GROUPS]
)
def test_logits(config, tied, used):
    layer = keras.layers.ReversibleEmbedding(
        131, 65, tie_weights=tied, logit_soft_cap=3.0
    )
    layer.build()
    model = keras.Sequential([keras.Input((3,)), layer])
    if isinstance(config, str):
        model.quantize(config)
    elif config is not None:
        model.quantize(config=config)
    x = inputs(1, 3, 65)
    check(
        model,
        lambda x: logits(layer, x),
        x,
        layer(x, reverse=True),
        EXACT,
    )
    assert len(used) == 1


@needs_numba
def test_many_rows_are_left_to_the_backend(used):
    layer = keras.layers.Dense(128)
    model = keras.Sequential([keras.Input((64,)), layer])
    x = inputs(MOST + 1, 64)
    check(model, layer, x, layer(x), EXACT)
    assert used == []


# === In generation ===

PROMPTS = {
    "token_ids": random_tokens(2, 20) * padding_mask([6, 6], 20),
    "padding_mask": padding_mask([6, 6], 20),
}


def make_lm(dtype="float32", num_layers=1):
    backbone = Llama3Backbone(
        vocabulary_size=100,
        num_layers=num_layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=72,
        intermediate_dim=130,
        dtype=dtype,
    )
    randomize(backbone)
    return greedy(Llama3CausalLM(backbone, None))


def greedy(lm):
    lm.compile(sampler="greedy", **XLA)
    return lm


def generated(lm):
    return lm.generate(PROMPTS, stop_token_ids=None)["token_ids"]


@needs_numba
@pytest.mark.parametrize("config", [WEIGHTS_ONLY, IN_GROUPS])
def test_generates_the_same(config, used, without_our_own):
    # Blocks that are alike are traced once, each with weights of its own.
    lm = make_lm(num_layers=3)
    lm.quantize(config=config)
    tokens = generated(greedy(lm))
    assert used
    count = len(used)
    without_our_own()
    np.testing.assert_array_equal(generated(greedy(lm)), tokens)
    assert len(used) == count


def projections(lm):
    """The layers that a block of Llama projects one tensor with."""
    (block,) = lm.backbone.transformer_layers
    attention = block._self_attention_layer
    return (
        [getattr(attention, f"_{x}_dense") for x in ("query", "key", "value")],
        [block._feedforward_gate_dense, block._feedforward_intermediate_dense],
    )


@needs_numba
@pytest.mark.parametrize(
    ("config", "together"),
    [(None, True), ("int8", True), (WEIGHTS_ONLY, True), (IN_GROUPS, True)]
    # What Keras rounds, it rounds for each of them.
    + [(ROUNDED, False)],
)
def test_what_has_one_input_is_one_product(config, together, monkeypatch):
    lm, outputs = make_lm(), []
    if config is not None:
        lm.quantize(config if isinstance(config, str) else None, config=config)
    multiply = multiplying._multiply

    def noted(form, *args):
        outputs.append(form.outputs)
        return multiply(form, *args)

    monkeypatch.setattr(multiplying, "_multiply", noted)
    generated(greedy(lm))
    expected = [72 + 36 + 36, 72, 130 + 130, 72, 100]
    if not together:
        # Alone, keys and values are too small.
        expected = [72, 72, 130, 130, 72, 100]
    # The prompt has too many rows. Of its last chunk, nobody asks for logits.
    assert outputs[-len(expected) :] == expected


@needs_numba
@pytest.mark.parametrize("change", ["other_input", "lora", "own_class"])
def test_what_has_another_input_is_a_product_of_its_own(
    change, without_our_own
):
    lm = make_lm()
    (_, key, value), (gate, _) = projections(lm)
    if change == "other_input":
        for layer in (key, gate):
            call = layer.call
            layer.call = lambda x, call=call, **kwargs: call(x + 1.0, **kwargs)
    elif change == "lora":
        value.enable_lora(2)
        value.lora_kernel_b.assign(value.lora_kernel_b + 0.1)
    else:

        class Doubled(keras.layers.EinsumDense):
            def call(self, x, training=None):
                return 2 * super().call(x)

        key.__class__ = Doubled
    tokens = generated(greedy(lm))
    without_our_own()
    np.testing.assert_array_equal(generated(greedy(lm)), tokens)


def scaled(lm, name):
    """A change that no greedy token survives: one kernel, negated."""
    (kernel,) = (x for x in lm.weights if x.path.endswith(name))
    return kernel, -keras.ops.convert_to_numpy(kernel)


GATE = "transformer_layer_0/feedforward_gate_dense/kernel"


@needs_numba
def test_follows_variables(tmp_path, used, without_our_own):
    lm = make_lm()
    before = generated(lm)
    path = str(tmp_path / "lm.weights.h5")
    lm.save_weights(path)
    kernel, value = scaled(lm, GATE)
    kernel.assign(value)
    assigned = generated(lm)
    lm.load_weights(path)
    np.testing.assert_array_equal(generated(lm), before)
    kernel.assign(value)
    lm.backbone.enable_lora(2)
    with_lora = generated(lm)
    lm.quantize("int8")
    quantized = generated(lm)
    (block,) = lm.backbone.transformer_layers
    assert block._feedforward_gate_dense.quantization_mode == "int8"

    without_our_own()
    # Made by other layers, of Keras' own classes.
    other = make_lm()
    kernel, value = scaled(other, GATE)
    kernel.assign(value)
    expected = generated(other)
    assert (expected != before).any()
    np.testing.assert_array_equal(assigned, expected)
    np.testing.assert_array_equal(with_lora, expected)
    other.quantize("int8")
    np.testing.assert_array_equal(quantized, generated(other))


@needs_numba
def test_the_next_token_follows(without_our_own):
    lm = make_lm()
    kernel, value = scaled(lm, GATE)

    def tokens_of(loop):
        mask = PROMPTS["padding_mask"].astype(bool)
        generation = loop.prefill(PROMPTS["token_ids"], mask, 256)
        for step, now in enumerate(loop.steps(generation, 20)):
            generation = now
            if step in (2, 5):
                kernel.assign(value if step == 2 else -value)
        return keras.ops.convert_to_numpy(generation.token_ids)[:, :20]

    tokens = tokens_of(loops.make_loop(lm))
    without_our_own()
    np.testing.assert_array_equal(tokens, tokens_of(loops.make_loop(lm)))


@needs_numba
def test_threads_share_what_is_packed(used):
    lm = make_lm()
    prompts = [
        {key: x[:, : 20 - i] for key, x in PROMPTS.items()} for i in range(3)
    ] * 4

    def generate(prompt):
        return lm.generate(prompt, stop_token_ids=None)["token_ids"]

    expected = [generate(x) for x in prompts]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for x, y in zip(threads.map(generate, prompts), expected):
            np.testing.assert_array_equal(x, y)


@needs_numba
def test_layers_stay_what_they_are(tmp_path):
    lm = make_lm()
    find_weights(lm)
    path = str(tmp_path / "backbone.keras")
    lm.backbone.save(path)
    loaded = keras.saving.load_model(path)
    for x, y in zip(lm.backbone.weights, loaded.weights, strict=True):
        assert x.path == y.path
    config = lm.backbone.get_config()
    assert config == make_lm().backbone.get_config() | {"name": config["name"]}


def test_without_numba(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "numba" else find_spec(name, *args),
    )
    availability._why_not_here.cache_clear()
    try:
        assert "numba is not installed" in description()
        lm = make_lm()
        assert find_weights(lm) is None
        dense = lm.backbone.transformer_layers[0]._feedforward_gate_dense
        assert type(dense) is keras.layers.Dense
    finally:
        availability._why_not_here.cache_clear()


@needs_numba
def test_what_is_compiled_is_kept(monkeypatch, tmp_path):
    import numba

    from keras_nlp_cache.kernels import compiling
    from keras_nlp_cache.products.kernels import KERNELS

    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    signature = numba.types.void(numba.types.int64, numba.types.int64)
    for hits in (0, 1):
        kernel = compiling.compiled(signature, KERNELS["int8"].piece)
        assert kernel.cache_hits == hits
    assert list(tmp_path.rglob("*.nbi"))
    assert description() == "compiled by numba"


@needs_numba
def test_what_is_compiled_is_that_of_the_code(monkeypatch):
    from keras_nlp_cache.kernels import compiling
    from keras_nlp_cache.kernels import floats

    module = "keras_nlp_cache.products.kernels"
    before, content = compiling._digest(module), compiling._content

    def changed(path):
        monkeypatch.setattr(
            compiling,
            "_content",
            lambda x: content(__file__ if x == path else x),
        )
        return compiling._digest(module)

    # What kernels import of this package is looked at, and nothing else.
    assert changed(floats.__file__) != before
    assert changed(loops.__file__) == before


@needs_numba
def test_what_is_compiled_serves_wherever_the_package_lies(
    monkeypatch, tmp_path
):
    """A kernel of its own, in two folders that say the same."""
    import numba

    from keras_nlp_cache.kernels import compiling

    monkeypatch.setenv("KERAS_NLP_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    signature = numba.types.void(numba.types.int64, numba.types.int64)
    for place, code, hits in (
        ("one", "pass", 0),
        ("another", "pass", 1),
        ("changed", "return", 0),
    ):
        file = tmp_path / place / "kernels" / "of_a_test.py"
        file.parent.mkdir(parents=True)
        file.write_text(f"def piece(job, piece):\n    {code}\n")
        name = "keras_nlp_cache.kernels.of_a_test"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        kernel = compiling.compiled(signature, module.piece)
        assert kernel.cache_hits == hits
