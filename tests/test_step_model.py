"""A decode step, exported and looped outside Keras, gives the same tokens."""

import keras
import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import random_tokens
from tests.families import to_numpy

SLOTS = 12
PROMPT = random_tokens(1, 4)[0]
# What Keras can export with each backend. ONNX from JAX needs jax2onnx, LiteRT
# from PyTorch litert-torch, neither of which goes with our constraints.
FORMATS = {
    "jax": ["tf_saved_model"],
    "tensorflow": ["tf_saved_model", "onnx", "litert"],
    "torch": ["onnx", "torch"],
}[keras.config.backend()]
ENDINGS = {"onnx": ".onnx", "litert": ".tflite", "torch": ".pt2"}


def runner(step, path, format):
    """A function from a dictionary of arrays to one, that no Keras is in."""
    return {
        "onnx": _in_onnxruntime,
        "litert": _in_litert,
        "tf_saved_model": _in_tensorflow,
        "torch": _in_torch,
    }[format](path, step.output_names)


def _in_onnxruntime(path, names):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda inputs: dict(zip(names, session.run(None, inputs)))


def _in_litert(path, names):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(path).get_signature_runner()
    return lambda inputs: {k: x.copy() for k, x in run(**inputs).items()}


def _in_tensorflow(path, names):
    import tensorflow as tf

    serve = tf.saved_model.load(path).signatures["serve"]

    def run(inputs):
        inputs = {name: tf.constant(x) for name, x in inputs.items()}
        return {name: x.numpy() for name, x in serve(**inputs).items()}

    # The signature lives as long as what was loaded.
    run.loaded = serve
    return run


def _in_torch(path, names):
    import torch

    module = torch.export.load(path).module()

    def run(inputs):
        outputs = module({k: torch.tensor(x) for k, x in inputs.items()})
        return {k: x.detach().numpy() for k, x in outputs.items()}

    return run


def greedy(run, step, prompt, slots):
    """Generates with a step, one token at a time."""
    state = {
        name: x
        for name, x in empty_inputs(step).items()
        if name.startswith("past_")
    }
    tokens = list(prompt)
    for index in range(slots - 1):
        outputs = run(
            {
                "token_ids": np.array([[tokens[index]]], "int32"),
                "cache_update_index": np.array(index, "int32"),
                **state,
            }
        )
        state = {
            name.replace("present", "past"): x
            for name, x in outputs.items()
            if name.startswith("present_")
        }
        if index + 1 == len(tokens):
            tokens.append(int(outputs["logits"][0, 0].argmax()))
    return tokens


def empty_inputs(step):
    return {
        name: np.zeros(spec.shape, spec.dtype)
        for name, spec in step.input_signature.items()
    }


def generated(lm):
    padding = ((0, 0), (0, SLOTS - len(PROMPT)))
    lm.compile(sampler="greedy")
    return lm.generate(
        {
            "token_ids": np.pad(PROMPT[None], padding),
            "padding_mask": np.pad(np.ones((1, len(PROMPT)), "int32"), padding),
        },
        stop_token_ids=None,
    )["token_ids"][0].tolist()


def exported(lm, format, tmp_path):
    step = keras_nlp_cache.StepModel(lm, batch_size=1, max_length=SLOTS)
    path = str(tmp_path / f"step{ENDINGS.get(format, '')}")
    step.export(path, format=format, verbose=False)
    return step, runner(step, path, format)


@deep_families
@pytest.mark.parametrize("format", FORMATS)
def test_same_tokens(family, format, tmp_path):
    lm = family.lm_pair[0]
    step, run = exported(lm, format, tmp_path)
    assert greedy(run, step, PROMPT, SLOTS) == generated(lm)


@pytest.mark.parametrize("format", FORMATS)
def test_an_edited_model(format, tmp_path):
    lm = surgery.insert_after(
        FAMILIES[3].lm_pair[0], 0, keras.layers.Rescaling(-3.0)
    )
    step, run = exported(lm, format, tmp_path)
    tokens = greedy(run, step, PROMPT, SLOTS)
    assert tokens == generated(lm)
    assert tokens != generated(FAMILIES[3].lm_pair[0])


@pytest.mark.parametrize("format", FORMATS)
def test_rows_at_places_of_their_own(format, tmp_path):
    lm = FAMILIES[2].lm_pair[0]
    step = keras_nlp_cache.StepModel(
        lm, batch_size=2, max_length=SLOTS, index_per_row=True
    )
    path = str(tmp_path / f"step{ENDINGS.get(format, '')}")
    step.export(path, format=format, verbose=False)
    run = runner(step, path, format)
    state, tokens = empty_inputs(step), [list(PROMPT), list(PROMPT)]
    for t in range(SLOTS - 1):
        # The second row waits for a while.
        index = np.array([t, max(t - 3, 0)], "int32")
        state["cache_update_index"] = index
        state["token_ids"] = np.array(
            [[row[i]] for row, i in zip(tokens, index)], "int32"
        )
        outputs = run(state)
        state = {
            name.replace("present", "past"): x for name, x in outputs.items()
        }
        logits = state.pop("logits")
        for row, i, x in zip(tokens, index, logits):
            if i + 1 == len(row):
                row.append(int(x[0].argmax()))
    expected = generated(lm)
    assert tokens == [expected, expected[:-3]]


@deep_families
def test_of_a_backbone(family):
    """Several tokens at once, and hidden states rather than logits."""
    backbone = family.pair[0]
    step = keras_nlp_cache.StepModel(
        backbone, batch_size=2, max_length=SLOTS, length=3
    )
    inputs = empty_inputs(step)
    inputs["token_ids"] = random_tokens(2, 3)
    inputs["cache_update_index"] = np.array(5, "int32")
    outputs = step(inputs)
    assert sorted(outputs) == step.output_names
    expected, cache = backbone(
        {
            "token_ids": inputs["token_ids"],
            "cache": backbone.make_cache(2, SLOTS),
            "cache_update_index": 5,
        }
    )
    expected = {
        "hidden_states": expected,
        "present_key_1": cache[1][0],
        "present_value_0": cache[0][1],
    }
    for name, x in expected.items():
        np.testing.assert_allclose(
            to_numpy(outputs[name]), to_numpy(x), atol=1e-5
        )
    assert step.weights and all(
        any(a is b for b in backbone.weights) for a in step.weights
    )


BAD = {
    "a model of upstream": (
        lambda: FAMILIES[0].lm_pair[1],
        {},
        r"`model`.*keras_nlp_cache.models.*keras_hub",
    ),
    "no tokens": (lambda: FAMILIES[0].pair[0], {"length": 0}, "`length`.*0"),
    "a truth value": (
        lambda: FAMILIES[0].pair[0],
        {"length": True},
        "`length`.*True",
    ),
    "more tokens than slots": (
        lambda: FAMILIES[0].pair[0],
        {"length": 13},
        "`length`.*`max_length`=12.*13",
    ),
    "no rows": (
        lambda: FAMILIES[0].pair[0],
        {"batch_size": 0},
        "`batch_size`.*1 or more.*0",
    ),
    "more slots than positions": (
        lambda: FAMILIES[0].pair[0],
        {"max_length": 65},
        "`max_length`.*64",
    ),
    "a cache of integers": (
        lambda: FAMILIES[0].pair[0],
        {"dtype": "int32"},
        "`dtype`.*floating.*int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    model, kwargs, match = BAD[name]
    arguments = {"batch_size": 1, "max_length": SLOTS, **kwargs}
    with pytest.raises(ValueError, match=match):
        keras_nlp_cache.StepModel(model(), **arguments)


def test_another_shape():
    step = keras_nlp_cache.StepModel(FAMILIES[0].pair[0], 1, SLOTS)
    inputs = empty_inputs(step)
    inputs["token_ids"] = random_tokens(1, 2)
    with pytest.raises(ValueError, match=r"`token_ids`.*\(1, 1\).*\(1, 2\)"):
        step(inputs)
