"""Adapters in a file of their own, Keras' and inserted ones alike."""

import h5py
import numpy as np
import pytest

from keras_nlp_cache import surgery
from tests.edits import full_forward
from tests.families import deep_families
from tests.families import divided
from tests.families import FAMILIES

PROJECTIONS = ["query", "output", "up", "down"]


def inserted(backbone, rank=2, where=slice(None), alpha=3.0):
    return surgery.add_lora(backbone, where, rank, PROJECTIONS, alpha)


def of_keras(backbone):
    backbone.enable_lora(3)
    return backbone


KINDS = {
    "inserted": inserted,
    "of Keras": of_keras,
    "of Keras, then inserted": lambda x: inserted(of_keras(x)),
    "inserted, then of Keras": lambda x: of_keras(inserted(x)),
}


def adapters(backbone):
    names = ("_adapter/down", "_adapter/up", "lora_kernel_a", "lora_kernel_b")
    return [w for w in backbone.weights if w.path.endswith(names)]


def trained(backbone):
    rng = np.random.default_rng(0)
    for weight in adapters(backbone):
        weight.assign(0.3 * rng.normal(size=weight.shape))
    return backbone


@pytest.mark.parametrize("kind", KINDS)
@deep_families
def test_round_trip(family, kind, tmp_path):
    path = tmp_path / "x.lora.h5"
    model = trained(KINDS[kind](family.backbone()))
    model.save_lora_weights(path)
    fresh = KINDS[kind](family.backbone())
    before = full_forward(fresh)
    fresh.load_lora_weights(path)
    expected = full_forward(model)
    assert np.abs(before - expected).max() > 1e-3
    np.testing.assert_array_equal(full_forward(fresh), expected)
    assert [x.name for x in tmp_path.iterdir()] == ["x.lora.h5"]


def test_keras_lora_is_enabled_by_loading(tmp_path):
    family, path = FAMILIES[0], tmp_path / "x.lora.h5"
    model = trained(of_keras(inserted(family.backbone())))
    model.save_lora_weights(path)
    fresh = inserted(family.backbone())
    fresh.load_lora_weights(path)
    np.testing.assert_array_equal(full_forward(fresh), full_forward(model))


SAVED = {
    "inserted": inserted,
    "both": lambda x: of_keras(inserted(x)),
    "of Keras": of_keras,
}
MISFITS = {
    "another rank": (
        "inserted",
        lambda x: inserted(x, 4),
        ["rank 4", "rank 2"],
    ),
    "another alpha": (
        "inserted",
        lambda x: inserted(x, alpha=9.0),
        ["`alpha` 9", "`alpha` 3"],
    ),
    "fewer places": (
        "inserted",
        lambda x: inserted(x, where=0),
        ["transformer_layer_1/", "query_adapter", "has not"],
    ),
    "no adapters": ("inserted", lambda x: x, ["query_adapter", "has not"]),
    "adapters that are missing": (
        "of Keras",
        lambda x: of_keras(inserted(x)),
        ["without", "query_adapter"],
    ),
    "Keras' that are missing": (
        "inserted",
        lambda x: of_keras(inserted(x)),
        ["enable_lora()", "without"],
    ),
    "Keras' of another rank": (
        "both",
        lambda x: (y := inserted(x), y.enable_lora(5))[0],
        ["rank 5", "rank 3"],
    ),
}


@pytest.mark.parametrize("kind", divided(MISFITS))
def test_refused(kind, tmp_path):
    saved, edit, words = MISFITS[kind]
    path = tmp_path / "x.lora.h5"
    trained(SAVED[saved](FAMILIES[0].backbone())).save_lora_weights(path)
    model = edit(FAMILIES[0].backbone())
    before = full_forward(model)
    with pytest.raises(ValueError) as error:
        model.load_lora_weights(path)
    for word in (*words, "x.lora.h5"):
        assert word in str(error.value), word
    np.testing.assert_array_equal(full_forward(model), before)


def test_files_that_are_none(tmp_path):
    backbone = FAMILIES[0].backbone()
    with pytest.raises(ValueError, match=r"surgery.add_lora\(\)"):
        backbone.save_lora_weights(tmp_path / "x.lora.h5")
    adapted = inserted(backbone)
    with pytest.raises(ValueError, match=r"\*.lora.h5"):
        adapted.save_lora_weights(tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())
    with h5py.File(tmp_path / "x.lora.h5", "w") as file:
        file["weights"] = 1
    with pytest.raises(ValueError, match="weights"):
        adapted.load_lora_weights(tmp_path / "x.lora.h5")
    with pytest.raises(FileNotFoundError):
        adapted.load_lora_weights(tmp_path / "y.lora.h5")
