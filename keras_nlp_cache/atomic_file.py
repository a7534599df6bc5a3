"""Files that are either written whole or left as they were."""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def replacing(path):
    """Yields a path to write to, and renames it to `path` at the end.

    If the block raises, what it wrote is removed, and an older file at `path`
    stays as it was. Permissions of an older file are kept.

    Args:
        path: str or path of a file.

    Raises:
        OSError: If the folder does not exist, or nothing can be written to it.
    """
    target = pathlib.Path(path).resolve()
    # Renaming is atomic within a file system, so the new file has to grow
    # next to the old one. A directory of its own goes away as a whole,
    # whatever a writer left in it.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.unfinished-", dir=target.parent
    ) as folder:
        unfinished = pathlib.Path(folder, target.name)
        yield unfinished
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
