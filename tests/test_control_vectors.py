"""Control vectors: trained, combined, kept in files, and applied."""

import functools
import importlib
import operator
import warnings

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache.surgery import tap
from keras_nlp_cache.surgery import vector_files
from keras_nlp_cache.surgery import vector_training
from keras_nlp_cache.surgery.control_vector import AddDirection
from keras_nlp_cache.surgery.control_vector import apply
from keras_nlp_cache.surgery.control_vector import ControlVector
from tests.families import compiled
from tests.families import decode
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy
from tests.families import XLA

HIDDEN_DIM = 32
POSITIVE = ("the quick fox", "a quick dog jumps over", "quick", "what is quick")
NEGATIVE = ("the lazy fox", "a lazy dog jumps over", "lazy", "what is lazy")
SUFFIXES = (".safetensors", ".gguf")
LENGTH = 12
PROMPT = {
    "token_ids": np.pad(random_tokens(1, 5), ((0, 0), (0, LENGTH - 5))),
    "padding_mask": padding_mask([5], LENGTH),
}

# Most tests do not care for which family a vector says that it is.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected a control vector for the family:UserWarning"
)
every_format = pytest.mark.parametrize("suffix", SUFFIXES)


def lm_with_text(family, **kwargs):
    preprocessor = family.preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    backbone = family.backbone(vocabulary_size=size, **kwargs)
    lm = family.task(backbone, preprocessor)
    lm.compile(sampler="greedy")
    return lm


def vector_for(blocks, seed=1, hint="llama"):
    rng = np.random.default_rng(seed)
    return ControlVector(
        {i: rng.normal(size=HIDDEN_DIM) for i in blocks}, model_hint=hint
    )


def hidden(backbone, token_ids):
    return to_numpy(backbone({"token_ids": token_ids}))


# === Training ===


def block_outputs(upstream):
    """A function from tokens to what blocks return, but for the first."""
    model = keras.Model(
        upstream.input, [x.output for x in upstream.transformer_layers[1:]]
    )

    def outputs(token_ids):
        inputs = {
            "token_ids": ops.convert_to_tensor(token_ids),
            "padding_mask": ops.ones_like(token_ids),
        }
        return [to_numpy(x) for x in tree.flatten(compiled(model)(inputs))]

    return outputs


@deep_families
def test_directions_are_those_of_an_independent_computation(family):
    lm = lm_with_text(family, num_layers=3)
    vector = ControlVector.train(lm, POSITIVE, NEGATIVE, batch_size=3)
    outputs = block_outputs(
        family.upstream_backbone(
            lm.backbone,
            num_layers=3,
            vocabulary_size=lm.backbone.vocabulary_size,
        )
    )

    def last_states(prompt):
        # Alone, and what follows the text is as if it were not there.
        x = lm.preprocessor.generate_preprocess([prompt], sequence_length=40)
        x = {name: ops.convert_to_numpy(value) for name, value in x.items()}
        last = x["padding_mask"].sum() - 1
        return [y[0, last] for y in outputs(x["token_ids"])]

    differences = np.array(
        [
            np.subtract(last_states(p), last_states(n))
            for p, n in zip(POSITIVE, NEGATIVE)
        ]
    )
    assert list(vector.directions) == [1, 2]
    assert vector.hidden_dim == HIDDEN_DIM
    # The hints of transformers' configs, which repeng writes.
    hint = {"Llama3": "llama"}.get(family.prefix, family.prefix.lower())
    assert vector.model_hint == hint
    for i, direction in enumerate(vector.directions.values()):
        expected = np.linalg.svd(differences[:, i])[2][0]
        expected *= np.sign(np.mean(differences[:, i] @ expected))
        np.testing.assert_allclose(direction, expected, atol=1e-3)
        assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-5)
        assert np.mean(differences[:, i] @ direction) > 0
    reverse = ControlVector.train(lm, NEGATIVE, POSITIVE)
    for block, direction in reverse.directions.items():
        np.testing.assert_allclose(
            direction, -vector.directions[block], atol=1e-3
        )


def test_a_direction_that_all_pairs_share_is_found():
    """PCA as it is would take their mean away, and find what is left."""
    rng = np.random.default_rng(0)
    shared = np.eye(1, HIDDEN_DIM, 3)[0]
    differences = 5 * shared + rng.normal(size=(20, HIDDEN_DIM))
    found = vector_training.principal_direction(1, differences)
    assert found @ shared > 0.9


def test_all_batches_have_one_shape(monkeypatch):
    shapes = set()
    cls = vector_training.LastHiddenStates
    call = cls.call

    def recorded(self, inputs):
        shapes.add(tuple(inputs["token_ids"].shape))
        return call(self, inputs)

    monkeypatch.setattr(cls, "call", recorded)
    lm = lm_with_text(FAMILIES[0])
    ControlVector.train(lm, POSITIVE, NEGATIVE, batch_size=3)
    assert len(shapes) == 1 and next(iter(shapes))[0] == 3


def test_a_steered_and_tapped_model_can_be_trained_on():
    lm = lm_with_text(FAMILIES[0])
    expected = ControlVector.train(lm, POSITIVE, NEGATIVE)
    steered = expected.apply(tap(lm, slice(None)), strength=0)
    assert list(expected.directions) == [1]
    np.testing.assert_allclose(
        ControlVector.train(steered, POSITIVE, NEGATIVE).directions[1],
        expected.directions[1],
        atol=1e-3,
    )


@functools.cache
def gpt2():
    return lm_with_text(FAMILIES[0])


BAD_TRAINING = {
    "no lists": (("the fox", "the dog"), "`positive`.*list.*'the fox'"),
    "empty lists": (([], []), r"`positive`.*at least one.*\[\]"),
    "unequal lengths": ((["fox", "dog"], ["fox"]), "2 positive and 1 neg"),
    "no string": ((["fox"], [3]), "`negative`.*strings.*3 at index 0"),
    "an empty string": ((["fox", ""], ["a", "b"]), "empty.*'' at index 1"),
    "equal prompts": ((["fox"], ["fox"]), "differ.*1 pairs.*equal"),
    "long prompts": ((["fox " * 40], ["dog " * 40]), "64 positions.*Shorten"),
    "no batch": ((["fox"], ["dog"], 0), "`batch_size`.*0"),
}


@pytest.mark.parametrize("kind", BAD_TRAINING)
def test_bad_training_data(kind):
    arguments, words = BAD_TRAINING[kind]
    with pytest.raises(ValueError, match=words):
        ControlVector.train(gpt2(), *arguments)


def test_models_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="`preprocessor`"):
        ControlVector.train(FAMILIES[0].lm_pair[0], ["fox"], ["dog"])
    with pytest.raises(ValueError, match="`CausalLM`.*GPT2Backbone"):
        ControlVector.train(gpt2().backbone, ["fox"], ["dog"])
    with pytest.raises(ValueError, match="at least 2.*Received one of 1"):
        ControlVector.train(
            lm_with_text(FAMILIES[0], num_layers=1), ["fox"], ["dog"]
        )
    with pytest.raises(ValueError, match="finite hidden states.*block 2"):
        vector_training.principal_direction(2, np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="block 2 cannot tell apart"):
        vector_training.principal_direction(2, np.zeros((2, 3)))


@pytest.mark.parametrize(
    "module, use",
    [
        (
            "sklearn.decomposition",
            lambda: ControlVector.train(gpt2(), ["fox"], ["dog"]),
        ),
        ("gguf", lambda: vector_for([1]).save("x.gguf")),
        ("safetensors.numpy", lambda: vector_for([1]).save("x.safetensors")),
    ],
)
def test_missing_packages(module, use, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    imported = importlib.import_module

    def without(name, *args):
        if name == module:
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(vector_files.importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"keras-nlp-cache\[steer\]"):
        use()
    assert not list(tmp_path.iterdir())


# === Arithmetic ===

finite = st.floats(-1e6, 1e6, width=32)
vectors = st.builds(
    ControlVector,
    st.dictionaries(
        st.integers(0, 40),
        arrays.arrays("float32", 4, elements=finite),
        min_size=1,
        max_size=4,
    ),
    model_hint=st.just("llama"),
)


@hypothesis.given(vectors, vectors)
def test_arithmetic(a, b):
    blocks = a.directions.keys() | b.directions.keys()
    zero = np.zeros(4, "float32")
    for operation in (operator.add, operator.sub):
        result = operation(a, b)
        assert result.model_hint == "llama"
        assert list(result.directions) == sorted(blocks)
        for i in blocks:
            np.testing.assert_array_equal(
                result.directions[i],
                operation(a.directions.get(i, zero), b.directions.get(i, zero)),
            )
    assert a + b == b + a
    assert a - b == a + -b == -(b - a)
    negated = -a
    assert -negated == a
    assert a + a == 2 * a == a * 2 == a * np.float32(2) == np.float64(2) * a
    assert (a * 2) / 2 == a / np.int64(1) == a
    assert (a == b) is (
        a.directions.keys() == b.directions.keys()
        and all((a.directions[i] == b.directions[i]).all() for i in blocks)
    )
    assert (a != b) is not (a == b)


def test_what_cannot_be_combined():
    a = vector_for([1])
    with pytest.raises(ValueError, match="'llama' and 'gemma'"):
        a + vector_for([1], hint="gemma")
    with pytest.raises(ValueError, match="hidden_dim 32 and 3"):
        a - ControlVector({1: np.ones(3)}, "llama")
    assert a != vector_for([1], hint="gemma") and a != 3
    for use in (
        lambda: a + 1,
        lambda: 1 - a,
        lambda: a * a,
        lambda: a * "2",
        lambda: a * 1j,
        lambda: np.ones(HIDDEN_DIM) * a,
        lambda: 1 / a,
        lambda: hash(a),
    ):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(ZeroDivisionError):
        a / 0
    for factor in (float("nan"), float("inf"), 1e300):
        with pytest.raises(ValueError, match="finite"):
            a * factor


def test_it_is_immutable():
    given = np.ones(3, "float64")
    vector = ControlVector({np.int64(2): given, 1: [1, 2, 3]}, "llama")
    given[0] = 7
    assert list(vector.directions) == [1, 2]
    assert {type(i) for i in vector.directions} == {int}
    assert vector.directions[2].tolist() == [1, 1, 1]
    assert vector.directions[2].dtype == "float32"
    with pytest.raises(ValueError, match="read-only"):
        vector.directions[1][0] = 0
    with pytest.raises(TypeError):
        vector.directions[1] = given
    with pytest.raises(AttributeError):
        vector.model_hint = "gemma"
    assert "blocks=[1, 2], hidden_dim=3, model_hint='llama'" in repr(vector)


@pytest.mark.parametrize(
    "directions, hint, words",
    [
        ({}, "llama", "at least one"),
        ([np.ones(3)], "llama", "dictionary"),
        ({1: np.ones(3)}, None, "`model_hint`.*None"),
        ({1: np.ones(3)}, "", "`model_hint`.*empty"),
        ({-1: np.ones(3)}, "llama", "indices.*-1"),
        ({True: np.ones(3)}, "llama", "indices.*True"),
        ({"1": np.ones(3)}, "llama", "indices.*'1'"),
        ({1: np.ones((3, 1))}, "llama", r"block 1.*shape \(3, 1\)"),
        ({1: []}, "llama", r"block 1.*shape \(0,\)"),
        ({1: "happy"}, "llama", "block 1.*numbers.*'happy'"),
        ({1: [np.nan, 1]}, "llama", "block 1.*finite.*1 numbers"),
        ({1: [1e300, 1]}, "llama", "block 1.*too large"),
        ({1: np.ones(3), 2: np.ones(4)}, "llama", r"same size.*\[3, 4\]"),
    ],
)
def test_bad_directions(directions, hint, words):
    with pytest.raises(ValueError, match=words):
        ControlVector(directions, hint)


# === Applying ===


@deep_families
def test_what_it_adds(family):
    """As computed by hand with upstream's layers, and through a cache."""
    ours, upstream = family.pair
    vector = vector_for([0, 1])
    steered = vector.apply(ours, strength=-0.7)
    token_ids = random_tokens(2, 6)
    first, second = upstream.transformer_layers
    x = keras.Model(upstream.input, first.output)(
        {
            "token_ids": ops.convert_to_tensor(token_ids),
            "padding_mask": ops.ones_like(token_ids),
        }
    )
    shifts = [
        ops.convert_to_tensor(0.7 * direction)
        for direction in vector.directions.values()
    ]
    x = second(x - shifts[0])
    expected = to_numpy(upstream.layer_norm(x - shifts[1]))
    found = hidden(steered, token_ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, hidden(ours, token_ids), atol=0.1)
    for splits in ([6], [3, 1, 1, 1]):
        np.testing.assert_allclose(
            decode(steered, token_ids, splits), expected, atol=1e-4
        )


@deep_families
def test_strength_0_gives_the_tokens_of_the_model(family):
    lm = family.lm_pair[0]
    lm.compile(sampler="greedy")
    before = [x.name for x in lm.backbone.layers], len(lm.weights)
    expected = lm.generate(PROMPT, stop_token_ids=None)["token_ids"]
    steered = (10 * vector_for([0, 1])).apply(lm, strength=0)
    assert type(steered) is type(lm)
    found = steered.generate(PROMPT, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)
    token_ids = PROMPT["token_ids"]
    np.testing.assert_array_equal(
        hidden(steered.backbone, token_ids), hidden(lm.backbone, token_ids)
    )
    # The original is as it was.
    layer = steered.backbone.get_layer("control_vector")
    layer.strength.assign(1.0)
    again = lm.generate(PROMPT, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(again, expected)
    assert ([x.name for x in lm.backbone.layers], len(lm.weights)) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_vector_for_another_family(suffix, tmp_path):
    path = tmp_path / f"other{suffix}"
    vector_for([1], hint="mistral").save(path)
    lm = FAMILIES[0].lm_pair[0]
    with pytest.warns(UserWarning, match="'gpt2'.*'mistral'"):
        ControlVector.load(path).apply(lm)
    with pytest.raises(ValueError, match="at most"):
        vector_for([7], hint="mistral").apply(lm)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("gpt2", "gpt2"),
        ("gpt2", "GPT-2"),
        ("gemma", "gemma"),
        ("gemma", "gemma2"),
        ("gemma2", "gemma2"),
        ("gemma2", "gemma"),
        ("llama", "llama"),
        ("llama", "llama3"),
        ("llama3", "llama"),
        ("llama3", "Llama-3"),
    ],
)
def test_a_vector_for_the_family_by_another_name(name, hint):
    (family,) = [x for x in FAMILIES if x.name == name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vector_for([1], hint=hint).apply(family.lm_pair[0])
    assert not [x for x in caught if "control vector" in str(x.message)]


def test_strength_is_assigned_without_tracing_again(monkeypatch):
    lm = FAMILIES[0].lm_pair[0]
    lm.compile(sampler="greedy")
    calls = []
    call = AddDirection.call

    def counted(self, x, block, **kwargs):
        calls.append(block)
        return call(self, x, block, **kwargs)

    monkeypatch.setattr(AddDirection, "call", counted)
    vector = vector_for([0, 1])
    steered = vector.apply(lm, strength=3.0)
    layer = steered.backbone.get_layer("control_vector")

    def tokens(model):
        return model.generate(PROMPT, stop_token_ids=None)["token_ids"]

    one = tokens(steered)
    traced = len(calls)
    assert traced > 0
    layer.strength.assign(-3.0)
    other = tokens(steered)
    if keras.config.backend() != "torch":  # PyTorch does not trace.
        assert len(calls) == traced
    assert (one != other).any()
    np.testing.assert_array_equal(other, tokens(vector.apply(lm, -3.0)))
    layer.directions.assign(-layer.directions)
    np.testing.assert_array_equal(one, tokens(steered))


def test_strength_is_assigned_between_streams(monkeypatch):
    lm = lm_with_text(FAMILIES[0])
    steered = vector_for([0, 1]).apply(lm)
    layer = steered.backbone.get_layer("control_vector")
    for strength in (-3.0, 0.0, 3.0):
        layer.strength.assign(strength)
        loop = steered.generation_loop
        text = "".join(steered.stream("the fox", 8, None))
        assert steered.generation_loop is loop
        fresh = vector_for([0, 1]).apply(lm, strength)
        assert text == "".join(fresh.stream("the fox", 8, None))


@deep_families
@pytest.mark.parametrize("options", [{**XLA}, {"run_eagerly": True}])
def test_strength_is_assigned_between_two_tokens(family, options):
    """Of one stream, which remembers what it read with the old one."""
    lm = vector_for([0, 1]).apply(lm_with_text(family), strength=0.0)
    lm.compile(sampler="greedy", **options)
    layer = lm.backbone.get_layer("control_vector")
    prompt, strengths = [3, 4, 5], (0, 0, -80, -80, 80, 80, 0, 0)

    def streamed(strengths):
        stream = lm.start_session().stream_tokens(prompt, len(strengths))
        for strength in strengths:
            layer.strength.assign(strength)
            yield next(stream)

    def by_hand(strengths):
        token_ids, index = prompt, 0
        cache = lm.backbone.make_cache(1, 16)
        for strength in strengths:
            layer.strength.assign(strength)
            # The prompt but for its last token, then token by token.
            for now in (token_ids[:-1], token_ids[-1:]):
                if not now:
                    continue
                logits, _, cache = lm.call_with_cache([now], cache, index)
                index += len(now)
            token_ids = [int(to_numpy(logits)[0, -1].argmax())]
            yield token_ids[0]

    tokens = list(streamed(strengths))
    assert tokens == list(by_hand(strengths))
    # What is seen a token late is another text.
    assert tokens != list(by_hand((0, *strengths[:-1])))


@in_turn("kind", ["keras", "preset"])
def test_files_of_steered_models(family, kind, tmp_path):
    steered = vector_for([1]).apply(lm_with_text(family), strength=2.5)
    if kind == "keras":
        steered.save(tmp_path / "steered.keras")
        loaded = keras_nlp_cache.load_model(tmp_path / "steered.keras")
    else:
        steered.save_to_preset(tmp_path)
        loaded = models.CausalLM.from_preset(str(tmp_path))
    loaded.compile(sampler="greedy")
    token_ids = random_tokens(2, 6) % steered.backbone.vocabulary_size
    np.testing.assert_array_equal(
        hidden(loaded.backbone, token_ids),
        hidden(steered.backbone, token_ids),
    )
    assert loaded.generate("the fox", 14) == steered.generate("the fox", 14)
    layer = loaded.backbone.get_layer("control_vector")
    assert float(layer.strength.value) == 2.5


@deep_families
def test_negated_twice(family):
    backbone, vector = family.pair[0], vector_for([0, 1])
    token_ids = random_tokens(2, 4)
    np.testing.assert_array_equal(
        hidden(apply(backbone, vector, 1.5), token_ids),
        hidden(apply(backbone, -vector, -1.5), token_ids),
    )


def test_applied_twice():
    backbone = FAMILIES[0].pair[0]
    one, two = vector_for([0, 1]), vector_for([1], seed=2)
    both = two.apply(one.apply(backbone, 0.5), 2)
    names = [x.name for x in both.layers if isinstance(x, AddDirection)]
    assert sorted(names) == ["control_vector", "control_vector_1"]
    assert both.get_layer("control_vector_1").strength.shape == ()
    assert float(both.get_layer("control_vector_1").strength.value) == 2
    token_ids = random_tokens(2, 4)
    np.testing.assert_allclose(
        hidden(both, token_ids),
        hidden((one / 2 + two * 2).apply(backbone), token_ids),
        atol=1e-4,
    )
    named = one.apply(backbone, name="mood")
    assert named.get_layer("mood").blocks == [0, 1]


def test_lower_precision():
    backbone = FAMILIES[3].backbone(dtype="bfloat16")
    steered = vector_for([0, 1]).apply(backbone, 0.3)
    token_ids = random_tokens(2, 4)
    output = steered({"token_ids": token_ids})
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    layer = steered.get_layer("control_vector")
    assert {x.dtype for x in layer.weights} == {"float32"}
    assert not layer.trainable_weights
    assert (hidden(steered, token_ids) != hidden(backbone, token_ids)).any()


BAD_APPLICATIONS = {
    "no vector": ((np.ones(32),), "`ControlVector`.*ndarray"),
    "too many blocks": ((vector_for([1, 2]),), "2 decoder blocks.*block 2"),
    "another size": ((ControlVector({1: np.ones(4)}, "x"),), "32.*size 4"),
    "not a number": ((vector_for([1]), "2"), "`strength`.*'2'"),
    "not real": ((vector_for([1]), 2j), "`strength`.*2j"),
    "not finite": ((vector_for([1]), float("nan")), "`strength`.*nan"),
    "a truth value": ((vector_for([1]), True), "`strength`.*True"),
}


@pytest.mark.parametrize("kind", BAD_APPLICATIONS)
def test_bad_applications(kind):
    arguments, words = BAD_APPLICATIONS[kind]
    with pytest.raises(ValueError, match=words):
        apply(FAMILIES[0].pair[0], *arguments)


def test_what_cannot_be_steered():
    vector = vector_for([1])
    with pytest.raises(ValueError, match="`model`"):
        vector.apply(FAMILIES[0].pair[1])
    layer = AddDirection(blocks=[1, 2], hidden_dim=3)
    with pytest.raises(ValueError, match=r"\[1, 2\].*0"):
        layer(np.ones((1, 1, 3)), block=0)
