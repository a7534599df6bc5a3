"""Neighbors that leave a machine with fewer cores than it has."""

import contextlib
import subprocess
import sys

# It ends with the process that started it, however that ended.
_BURN = "import os\nstarter = os.getppid()\nwhile os.getppid() == starter: pass"


@contextlib.contextmanager
def neighbors(count):
    """Has a number of processes burn a core each, as long as the block runs."""
    running = [
        subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
