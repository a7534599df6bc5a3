"""What is interrupted, or finds the disk full, leaves files as they were."""

import errno
import os
import pathlib

import keras
import numpy as np
import pytest

from keras_nlp_cache import surgery
from tests.families import divided
from tests.families import FAMILIES
from tests.families import random_tokens
from tests.families import to_numpy

GPT2 = FAMILIES[0]
TOKENS = {"token_ids": random_tokens(1, 8) % 16}


def save_session(lm, folder):
    session = lm.start_session()
    session.send("the fox", 4, None)
    session.save(folder / "kept.safetensors")


def save_vector(lm, folder):
    vector = surgery.ControlVector({0: np.ones(32, "float32")}, "gpt2")
    vector.save(folder / "kept.gguf")


def save_task(lm, folder):
    lm.save_to_preset(str(folder / "preset"))


def save_backbone(lm, folder):
    lm.backbone.save_to_preset(str(folder / "preset"))


# The last step of each, and what writes most of it.
CASES = [
    (owner, name, save)
    for owner, name, saves in (
        (os, "replace", [save_session, save_vector, save_task]),
        (pathlib.Path, "write_bytes", [save_session]),
        (pathlib.Path, "write_text", [save_task, save_backbone]),
        (keras.Model, "save_weights", [save_task, save_backbone]),
    )
    for save in saves
]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def files(folder):
    return {
        x.relative_to(folder): x.read_bytes()
        for x in folder.rglob("*")
        if x.is_file()
    }


@pytest.mark.parametrize("owner, name, save", divided(CASES))
@pytest.mark.parametrize("fault", [full, interrupt])
@pytest.mark.parametrize("older", [True, False])
def test_saving(owner, name, save, fault, older, tmp_path, monkeypatch):
    lm = GPT2.text_lm()
    before = to_numpy(lm.backbone(TOKENS))
    if older:
        save(lm, tmp_path)
    kept = files(tmp_path)
    assert bool(kept) is older
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(
            OSError if fault is full else KeyboardInterrupt,
            match="No space left" if fault is full else None,
        ):
            save(lm, tmp_path)
    assert files(tmp_path) == kept
    assert not [x for x in tmp_path.iterdir() if "unfinished" in x.name]
    # The model can be used, and saved when there is room.
    np.testing.assert_array_equal(to_numpy(lm.backbone(TOKENS)), before)
    save(lm, tmp_path)
    assert files(tmp_path)


def test_streaming():
    """Ctrl-C between two pieces leaves a model that answers as before."""
    lm = GPT2.text_lm()
    expected = list(lm.stream("the fox", 6, None))
    pieces = lm.stream("the fox", 6, None)
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert list(lm.stream("the fox", 6, None)) == expected
