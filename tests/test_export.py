"""`export()` does with our backbones what it does with upstream's."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.families import deep_families
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

INPUTS = {
    "token_ids": random_tokens(2, 8),
    "padding_mask": padding_mask([5, 8], 8),
}
FIXED_SHAPES = [
    {
        name: keras.InputSpec(shape=x.shape, dtype="int32", name=name)
        for name, x in INPUTS.items()
    }
]


def outcome(model, path, **kwargs):
    """What an exported model answers, or the type of error on the way."""
    try:
        if keras.config.backend() == "torch":
            return _through_torch(model, f"{path}.pt2", **kwargs)
        return _through_tensorflow(model, str(path), **kwargs)
    except Exception as e:
        return type(e)


def _through_tensorflow(model, path, **kwargs):
    model.export(path, verbose=False, **kwargs)
    loaded = tf.saved_model.load(path)
    return np.array(
        loaded.serve({name: tf.constant(x) for name, x in INPUTS.items()})
    )


def _through_torch(model, path, **kwargs):
    import torch

    model.export(path, format="torch", verbose=False, **kwargs)
    loaded = torch.export.load(path).module()
    inputs = {name: torch.tensor(x) for name, x in INPUTS.items()}
    return loaded(inputs).detach().numpy()


any_or_fixed_shapes = pytest.mark.parametrize(
    "kwargs",
    [{}, {"input_signature": FIXED_SHAPES}],
    ids=["any shapes", "fixed shapes"],
)


@deep_families
@any_or_fixed_shapes
def test_backbones(family, kwargs, tmp_path):
    """The two inputs that upstream has are enough."""
    check(family.pair, tmp_path, kwargs)


@any_or_fixed_shapes
def test_tasks(kwargs, tmp_path):
    check(FAMILIES[0].lm_pair, tmp_path, kwargs)


def check(models, folder, kwargs):
    ours, upstream = (
        outcome(model, folder / f"{id(model)}", **kwargs) for model in models
    )
    # Only TensorFlow exports these models for any shapes.
    if not kwargs and keras.config.backend() != "tensorflow":
        assert isinstance(ours, type) and ours is upstream
        return
    for expected in (upstream, to_numpy(models[0](INPUTS))):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-4)
