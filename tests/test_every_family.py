"""What a user does with a task beside `generate()`, with each family."""

import numpy as np
import pytest
from keras import ops

import keras_nlp_cache
from keras_nlp_cache import surgery
from tests.families import assert_greedy
from tests.families import compiled
from tests.families import compiled_as_it_is
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

LENGTH = 16
PROMPTS = {
    "token_ids": random_tokens(2, LENGTH) * padding_mask([4, 6], LENGTH),
    "padding_mask": padding_mask([4, 6], LENGTH).astype(bool),
}


@each_kind
def test_a_draft_model(family):
    lm = family.lm_pair[0]
    lm.compile(sampler="greedy")
    draft = surgery.remove(lm, 1)
    if family.keeps_states:
        with pytest.raises(ValueError, match="a state, which cannot go back"):
            lm.generate(PROMPTS, stop_token_ids=None, assistant_model=draft)
        return
    expected = lm.generate(PROMPTS, stop_token_ids=None)
    actual = lm.generate(PROMPTS, stop_token_ids=None, assistant_model=draft)
    np.testing.assert_array_equal(actual["token_ids"], expected["token_ids"])


@each_kind
def test_a_step_to_export(family):
    lm = family.lm_pair[0]
    token_ids = random_tokens(1, 3)
    step = keras_nlp_cache.StepModel(lm, batch_size=1, max_length=4)
    state = {
        name: np.zeros(spec.shape, spec.dtype)
        for name, spec in step.input_signature.items()
    }
    call = compiled(step)
    for i in range(3):
        state |= {
            "token_ids": token_ids[:, i : i + 1],
            "cache_update_index": np.int32(i),
        }
        outputs = call({k: ops.convert_to_tensor(x) for k, x in state.items()})
        state |= {
            name.replace("present", "past"): x
            for name, x in outputs.items()
            if name.startswith("present")
        }
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    np.testing.assert_allclose(
        to_numpy(outputs["logits"])[:, 0],
        to_numpy(compiled(lm)(inputs))[:, -1],
        atol=1e-4,
        rtol=1e-4,
    )


@each_kind
def test_a_session(family):
    """Turn by turn, each token is the likeliest after all before it."""
    preprocessor = FAMILIES[0].preprocessor(sequence_length=LENGTH)
    size = preprocessor.tokenizer.vocabulary_size()
    lm = family.task(family.backbone(vocabulary_size=size), preprocessor)
    lm.compile(sampler="greedy")
    session = lm.start_session()
    session.send("the fox", max_new_tokens=3, stop_token_ids=None)
    start = len(session.token_ids)
    session.send(" and", max_new_tokens=4, stop_token_ids=None)
    token_ids = np.array([session.token_ids])
    assert token_ids.shape[1] > start + 4
    assert_greedy(lm, token_ids, token_ids.shape[1] - 4)


@each_kind
def test_quantized(family):
    lm = family.task(family.backbone())
    lm.compile(sampler="greedy")
    lm.quantize("int8")
    tokens = lm.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    kept = PROMPTS["padding_mask"]
    np.testing.assert_array_equal(tokens[kept], PROMPTS["token_ids"][kept])
    # What it says is what its own call without a cache says.
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    logits = compiled_as_it_is(lm)(inputs)
    likeliest = to_numpy(logits).argmax(axis=-1)
    assert np.mean((likeliest[:, :-1] == tokens[:, 1:])[~kept[:, 1:]]) > 0.9


def test_router_logits_are_in_nobodys_way():
    """Asked for, upstream's blocks return a pair, and nothing generates."""
    mixtral = next(x for x in FAMILIES if x.name == "mixtral")
    lm = mixtral.task(mixtral.backbone(output_router_logits=True))
    lm.compile(sampler="greedy")
    tokens = lm.generate(PROMPTS, stop_token_ids=None)["token_ids"]
    assert_greedy(lm, tokens[1:], 6)
