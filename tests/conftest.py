"""Fixtures shared by the suite, and the backend in its header."""

import gc
import os

import keras
import pytest

from tests.families import PATCHED


def pytest_configure(config):
    """What XLA compiles for JAX is kept, for all processes and next time.

    Small models differ in little, and most of the time goes to the compiler.
    """
    kept = config.pluginmanager.hasplugin("cacheprovider")
    if kept and keras.config.backend() == "jax":
        import jax

        for name, value in {
            "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }.items():
            jax.config.update(name, value)
            # For the programs that tests start.
            os.environ[name.upper()] = str(value)


def pytest_report_header():
    subject = "patched keras_hub" if PATCHED else "keras_nlp_cache"
    return (
        f"{subject}, keras {keras.__version__}, "
        f"backend {keras.config.backend()}"
    )


@pytest.fixture(autouse=True)
def _deterministic():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _light_garbage_collection():
    """Keras collects garbage for each layer it quantizes.

    Over all that three frameworks import, that is half a second a layer, and
    more with each graph that TensorFlow never gives back.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """What is kept for as long as the process lives, is kept for one file."""
    yield
    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()
    if keras.config.backend() == "tensorflow":
        _forget_custom_gradients()
    gc.unfreeze()
    gc.collect()


def _forget_custom_gradients():
    """TensorFlow keeps each, such as that of SiLU, with graph and weights."""
    from tensorflow.python.framework import ops

    gradients = ops.gradient_registry._registry
    for name in [x for x in gradients if x.startswith("CustomGradient")]:
        del gradients[name]


@pytest.fixture(scope="session")
def smollm2():
    """Path of SmolLM2-135M-Instruct, converted once per machine."""
    from keras_nlp_cache import default_model

    return default_model.preset()


if keras.config.backend() == "tensorflow" and not PATCHED:
    from keras_nlp_cache.loops.tensorflow_loop import TensorFlowLoop

    # TensorFlow keeps what XLA compiled for as long as the process lives, some
    # 20 MiB for each of hundreds of small models. Tests of the compiled loops
    # ask for it with `jit_compile=True`.
    TensorFlowLoop.jit_compile_by_default = False
