"""Models can be copied and pickled, edits included."""

import copy
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_nlp_cache import surgery
from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

PROMPT = {
    "token_ids": random_tokens(1, 10) * padding_mask([4], 10),
    "padding_mask": padding_mask([4], 10),
}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@deep_families
@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy])
def test_tasks(family, duplicate):
    lm = family.lm_pair[0]
    lm.compile(sampler="greedy")
    expected = lm.generate(PROMPT, stop_token_ids=None)["token_ids"]
    other = duplicate(lm)
    assert type(other) is type(lm)
    assert type(other.backbone) is type(lm.backbone)
    other.compile(sampler="greedy")
    actual = other.generate(PROMPT, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(actual, expected)
    # They share nothing.
    other.backbone.set_weights([x * 0 for x in other.backbone.get_weights()])
    again = lm.generate(PROMPT, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(again, expected)


@deep_families
@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy])
def test_edited_backbones(family, duplicate):
    backbone = surgery.insert_after(
        family.pair[0], 0, keras.layers.Rescaling(0.5)
    )
    other = duplicate(backbone)
    inputs = {"token_ids": PROMPT["token_ids"]}
    np.testing.assert_allclose(
        to_numpy(other(inputs)), to_numpy(backbone(inputs)), atol=1e-6
    )
    assert len(other.make_cache(1, 8)) == len(backbone.make_cache(1, 8))


SCRIPT = """
import pickle, sys
from keras_nlp_cache import load_model

with open(sys.argv[1], "rb") as file:
    found = [pickle.load(file)] if sys.argv[1].endswith("pickle") else []
found = found or [load_model(sys.argv[1])]
found[0].make_cache(1, 8)
"""


@pytest.mark.parametrize("suffix", ["pickle", "keras"])
def test_a_process_that_imported_no_model(tmp_path, suffix):
    backbone = FAMILIES[0].pair[0]
    path = tmp_path / f"backbone.{suffix}"
    if suffix == "pickle":
        path.write_bytes(pickle.dumps(backbone))
    else:
        backbone.save(path)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
