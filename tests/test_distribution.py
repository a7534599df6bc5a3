"""Generation over several devices: the same tokens, a share of the cache."""

import subprocess
import sys

import keras
import pytest

from tests.families import DEEP

if keras.config.backend() != "jax":
    pytest.skip("`keras.distribution` is JAX's", allow_module_level=True)

CASES = [("data", family) for family in DEEP] + [
    ("model", family)
    for family in DEEP
    if hasattr(family.ours("Backbone"), "get_layout_map")
]


@pytest.mark.parametrize(
    "kind, family", CASES, ids=[f"{kind}-{x.name}" for kind, x in CASES]
)
def test_tokens_and_shares(kind, family):
    # How many devices there are is settled when JAX starts.
    process = subprocess.run(
        [sys.executable, "-m", "tests.distributed", kind, family.name],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
