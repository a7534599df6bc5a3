"""Files and folders that are either written whole or left as they were."""

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


@contextlib.contextmanager
def filling(folder):
    """Yields a folder to write to, and moves its files to `folder` at the end.

    If the block raises, what it wrote is removed, and what was in `folder`
    stays as it was.

    Args:
        folder: str or path of a folder, which is made if it does not exist.

    Raises:
        OSError: If nothing can be written there.
    """
    target = pathlib.Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.unfinished-", dir=target.parent
    ) as unfinished:
        yield pathlib.Path(unfinished)
        for source in sorted(pathlib.Path(unfinished).rglob("*")):
            moved = target / source.relative_to(unfinished)
            if source.is_dir():
                moved.mkdir(parents=True, exist_ok=True)
            else:
                moved.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, moved)
