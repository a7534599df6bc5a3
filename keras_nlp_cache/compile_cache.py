"""What XLA compiles for a model, kept for the next process.

XLA takes many seconds for a decode loop. JAX and TensorFlow can keep what comes
of it in a folder, and do so in the user's cache folder, as long as nobody told
them otherwise:

- a folder that a user gave JAX (`jax_compilation_cache_dir`) or TensorFlow
  (`--tf_xla_persistent_cache_directory` in `TF_XLA_FLAGS`) is left as it is,
- `JAX_ENABLE_COMPILATION_CACHE=false` holds for JAX,
- `KERAS_NLP_CACHE_COMPILED=0` holds for both.

On JAX, a process has one such folder for all that it compiles. It is set when
the first loop is made, not when the package is imported. TensorFlow reads its
flag once, before the first operation: so only programs, as the command line is
one, can set it, by `for_programs()`.

The folder holds up to `MOST_BYTES` for each backend, of which the oldest go
first. What was compiled for one processor, another may not be able to run: each
kind has a folder of its own.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import time

from keras_nlp_cache.files.cache_folder import cache_folder

MOST_BYTES = 2**30

_SWITCH = "KERAS_NLP_CACHE_COMPILED"
# In less time, it is compiled.
_LEAST_SECONDS = 0.1
# What was in use a short time ago, another process may be about to read.
_IN_USE_SECONDS = 3600
_TENSORFLOW_FLAG = "--tf_xla_persistent_cache_directory"


def for_jax():
    """Has JAX keep what it compiles, unless it was told where or not to."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    if not jax.config.jax_enable_compilation_cache:
        return
    folder = _folder("jax")
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Where these are the defaults of JAX, and not a user's.
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1:
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS
        )
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def for_programs():
    """Has TensorFlow keep what it compiles, unless it was told where.

    To be called before TensorFlow runs its first operation.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if _TENSORFLOW_FLAG in flags:
        return
    folder = _folder("tensorflow")
    # TensorFlow fails where it cannot write, rather than doing without.
    if folder is None or shutil.disk_usage(folder).free < MOST_BYTES:
        return
    _make_room(folder.parent)
    os.environ["TF_XLA_FLAGS"] = f"{flags} {_TENSORFLOW_FLAG}={folder}".strip()


def _folder(package):
    """A folder that can be written to, `None` if there is to be none."""
    if os.environ.get(_SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return None
    folder = cache_folder() / "compiled" / package / _kind(package)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _kind(package):
    """Names the version that compiles, and the processor that can run it."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version}-{_processor()}"


def _processor():
    told = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # On x86 and on ARM.
    told += sorted({x for x in lines if x.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _make_room(folder):
    """Removes the oldest files, of all versions, until few enough are left."""
    files = []
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:  # Another process makes room, too.
            continue
        if path.is_file():
            last = max(status.st_atime, status.st_mtime)
            files.append((last, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for last, size, path in sorted(files):
        if total <= MOST_BYTES or last > time.time() - _IN_USE_SECONDS:
            break
        path.unlink(missing_ok=True)
        total -= size
