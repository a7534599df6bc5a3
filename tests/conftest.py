"""Fixtures shared by the suite, and the backend in its header."""

import keras
import pytest


def pytest_report_header():
    return f"keras {keras.__version__}, backend {keras.config.backend()}"


@pytest.fixture(autouse=True)
def _deterministic():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """Path of SmolLM2-135M-Instruct, converted once per machine."""
    from keras_nlp_cache import default_model

    return default_model.preset()


if keras.config.backend() == "tensorflow":
    from keras_nlp_cache.loops.tensorflow_loop import TensorFlowLoop

    # TensorFlow keeps what XLA compiled for as long as the process lives, some
    # 20 MiB for each of hundreds of small models. Tests of the compiled loops
    # ask for it with `jit_compile=True`.
    TensorFlowLoop.jit_compile_by_default = False
