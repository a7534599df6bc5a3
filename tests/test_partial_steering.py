"""Control vectors of another strength in each row, or where one generates."""

import numpy as np
import pytest

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache import StepModel
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import in_turn
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy
from tests.test_control_vectors import hidden
from tests.test_control_vectors import lm_with_text
from tests.test_control_vectors import vector_for

LENGTHS, TOTAL = [3, 5], 12
PROMPTS = {
    "token_ids": random_tokens(2, TOTAL) * padding_mask(LENGTHS, TOTAL),
    "padding_mask": padding_mask(LENGTHS, TOTAL),
}
STRENGTHS = (-2.0, 3.0)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected a control vector for the family:UserWarning"
)


def steered_lm(family, **kwargs):
    kwargs.setdefault("strength", 3.0)
    lm = vector_for([0, 1]).apply(family.lm_pair[0], **kwargs)
    lm.compile(sampler="greedy")
    return lm


def tokens(lm, prompts=PROMPTS):
    return lm.generate(prompts, stop_token_ids=None)["token_ids"]


def assert_steered_where_one_generates(lm, token_ids):
    """Each token is the likeliest one in a call without a cache on all.

    From the last token of its prompt on, which the first answer follows.
    """
    generated = np.arange(TOTAL) >= np.array(LENGTHS)[:, None] - 1
    x = lm.backbone(
        {"token_ids": token_ids, "generated": generated.astype("int32")}
    )
    logits = lm.backbone.token_embedding(x, reverse=True)
    likeliest = to_numpy(logits).argmax(axis=-1)
    answered = generated[:, :-1]
    np.testing.assert_array_equal(
        token_ids[:, 1:][answered], likeliest[:, :-1][answered]
    )


def test_a_strength_for_each_row():
    family = FAMILIES[3]
    lm = steered_lm(family, strength=STRENGTHS)
    alone = [steered_lm(family, strength=x) for x in STRENGTHS]
    token_ids = random_tokens(2, 6)
    for row, model in enumerate(alone):
        np.testing.assert_allclose(
            hidden(lm.backbone, token_ids)[row],
            hidden(model.backbone, token_ids)[row],
            atol=1e-5,
        )
    found = tokens(lm)
    for row, model in enumerate(alone):
        np.testing.assert_array_equal(found[row], tokens(model)[row])
    # Assigned, too, and seen by what is compiled already.
    layer = lm.backbone.get_layer("control_vector")
    layer.strength.assign(STRENGTHS[::-1])
    found = tokens(lm)
    for row, model in enumerate(reversed(alone)):
        np.testing.assert_array_equal(found[row], tokens(model)[row])


@deep_families
def test_where_one_generates(family):
    lm = steered_lm(family, generated_only=True)
    found = tokens(lm)
    assert_steered_where_one_generates(lm, found)
    everywhere = tokens(steered_lm(family))
    assert (found != tokens(family.lm_pair[0])).any()
    assert (found != everywhere).any()
    # Without a word on what is generated, nothing is steered.
    token_ids = random_tokens(2, 6)
    np.testing.assert_array_equal(
        hidden(lm.backbone, token_ids),
        hidden(family.lm_pair[0].backbone, token_ids),
    )


@deep_families
def test_through_a_cache(family):
    """`generated` goes with the tokens of a call, as positions do."""
    backbone = steered_lm(family, generated_only=True).backbone
    token_ids = random_tokens(1, 6)
    generated = np.array([[0, 0, 1, 0, 1, 1]])
    whole = backbone({"token_ids": token_ids, "generated": generated})
    cache, parts = backbone.make_cache(1, 6), []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        x, cache = backbone(
            {
                "token_ids": token_ids[:, start:end],
                "cache": cache,
                "cache_update_index": start,
                "generated": generated[:, start:end],
            }
        )
        parts.append(to_numpy(x))
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), to_numpy(whole), atol=1e-4
    )


def test_guessed_tokens_are_generated():
    """Those of a draft model are steered as those that are picked alone."""
    family = FAMILIES[3]
    lm = steered_lm(family, generated_only=True)
    draft = family.lm_pair[0]
    draft.compile(sampler="greedy")
    found = lm.generate(PROMPTS, stop_token_ids=None, assistant_model=draft)
    np.testing.assert_array_equal(found["token_ids"], tokens(lm))


def test_sessions():
    """What a user says is not steered, what is answered is, in all turns."""
    lm = lm_with_text(FAMILIES[3])
    steered = vector_for([0, 1]).apply(lm, 3.0, generated_only=True)
    text = steered.generate("the fox", max_length=12, stop_token_ids=None)
    assert "".join(steered.stream("the fox", 5, None)) in text
    session = steered.start_session()
    first = list(session.stream_tokens([3, 4, 5], 3, None))
    second = list(session.stream_tokens([6, 7], 3, None))
    told, index = [3, 4, 5, *first, 6, 7, *second], 0
    generated = [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    x = steered.backbone({"token_ids": [told], "generated": [generated]})
    likeliest = to_numpy(
        steered.backbone.token_embedding(x, reverse=True)
    ).argmax(axis=-1)[0]
    for index in [2, 3, 4, 7, 8, 9]:
        assert told[index + 1] == likeliest[index]


@in_turn("kind", ["keras", "preset", "keras"])
def test_files(family, kind, tmp_path):
    lm = vector_for([1]).apply(
        lm_with_text(family), strength=STRENGTHS, generated_only=True
    )
    if kind == "keras":
        lm.save(tmp_path / "lm.keras")
        loaded = keras_nlp_cache.load_model(tmp_path / "lm.keras")
    else:
        lm.save_to_preset(tmp_path)
        loaded = models.CausalLM.from_preset(str(tmp_path))
    loaded.compile(sampler="greedy")
    prompts = ["the fox", "the dog"]
    assert loaded.generate(prompts, 14) == lm.generate(prompts, 14)
    layer = loaded.backbone.get_layer("control_vector")
    np.testing.assert_array_equal(to_numpy(layer.strength.value), STRENGTHS)


def test_refused():
    lm = steered_lm(FAMILIES[0], strength=STRENGTHS)
    with pytest.raises(ValueError, match="batch of 2 rows.*3"):
        lm.backbone({"token_ids": random_tokens(3, 4)})
    for strength in ([], [1.0, "x"], [1.0, float("inf")], np.ones((1, 2))):
        with pytest.raises(ValueError, match="`strength`.*finite number"):
            steered_lm(FAMILIES[0], strength=strength)
    lm = steered_lm(FAMILIES[0], generated_only=True)
    with pytest.raises(ValueError, match="generated"):
        StepModel(lm, batch_size=1, max_length=8)
    lm.compile(sampler="beam")
    with pytest.raises(ValueError, match="one token at a time.*BeamSampler"):
        lm.generate(PROMPTS, stop_token_ids=None)
    with pytest.raises(ValueError, match="`generated`.*batch=1, length=3"):
        lm.backbone({"token_ids": [[1, 2, 3]], "generated": [[1]]})


def test_edited_on():
    """Further edits keep what is steered, row by row."""
    lm = steered_lm(FAMILIES[3], strength=STRENGTHS, generated_only=True)
    edited = keras_nlp_cache.surgery.add_lora(lm, 1, rank=2)
    edited.compile(sampler="greedy")
    np.testing.assert_array_equal(tokens(edited), tokens(lm))
    assert (tokens(lm) != tokens(FAMILIES[3].lm_pair[0])).any(axis=1).all()
