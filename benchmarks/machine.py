"""What the machine is that results are of."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import re

import psutil

from benchmarks import floors

# What speed depends on, and constraints.txt need not have been used for.
PACKAGES = (
    "keras",
    "keras-hub",
    "keras-nlp-cache",
    "jax",
    "tensorflow",
    "torch",
    "numba",
    "numpy",
    "transformers",
    "llama-cpp-python",
)


@functools.cache
def description():
    """The machine as a dictionary. Measures it the first time."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "bytes_per_second": floors.bandwidth(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }


def in_words(found):
    parts = [f"{found['cores']} cores", found["cpu"]]
    parts += [f"{found['memory_gib']:.0f} GiB"]
    parts += [f"{found['bytes_per_second'] / 1e9:.0f} GB/s"]
    return ", ".join(parts + [found["gpu"]] * bool(found["gpu"]))


def _cpu():
    """The name that Linux gives it, where there is one."""
    path = pathlib.Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
