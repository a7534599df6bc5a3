"""Generation in the scope of a `tf.distribute` strategy: the same text."""

import subprocess
import sys

import keras
import pytest

if keras.config.backend() != "tensorflow":
    pytest.skip("`tf.distribute` is TensorFlow's", allow_module_level=True)


def test_mirrored_over_two_devices():
    """Of models that were made in the scope, and of others."""
    # How many devices there are is settled when TensorFlow starts.
    process = subprocess.run(
        [sys.executable, "-m", "tests.mirrored", "gpt2"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
