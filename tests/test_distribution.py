"""Generation over several devices: the same tokens, a share of the cache."""

import subprocess
import sys

import keras
import pytest

from tests.families import DEEP

if keras.config.backend() != "jax":
    pytest.skip("`keras.distribution` is JAX's", allow_module_level=True)


def test_tokens_and_shares():
    cases = [f"data:{family.name}" for family in DEEP] + [
        f"model:{family.name}"
        for family in DEEP
        if hasattr(family.ours("Backbone"), "get_layout_map")
    ]
    assert len(cases) > len(DEEP)
    # How many devices there are is settled when JAX starts.
    process = subprocess.run(
        [sys.executable, "-m", "tests.distributed", *cases],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
