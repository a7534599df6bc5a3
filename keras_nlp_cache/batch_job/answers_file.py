"""Answers in a file of JSON lines that is never left with half a line."""

import contextlib
import errno
import json
import os
import pathlib
import stat
import time

import filelock

from keras_nlp_cache.files import atomic_file

_FORMAT = "keras_nlp_cache.batch_job"
# What answers are of.
_PARTS = ("prompts", "settings", "model")
# The process may end at any time and lose nothing. This is for the machine.
_SECONDS_BETWEEN_SYNCS = 5.0


class AnswersFile:
    """The answers of one job, by one process at a time.

    Beside it lies a file, `*.job`, that says which prompts, settings and model
    they are of.

    Args:
        path: str or path.
        overwrite: bool. Whether to begin anew, whatever is there.

    Attributes:
        done: Set of the ids of prompts that need no answer any more.

    Raises:
        ValueError: If the file holds something else than answers.
        OSError: If it cannot be opened, or another job has it open.
    """

    def __init__(self, path, overwrite=False):
        self.path = pathlib.Path(path)
        self.done = set()
        self._job_path = self.path.with_name(f"{self.path.name}.job")
        self._job = None
        # Where whole answers end, and what is to follow there.
        self._end, self._missing = 0, b""
        self._synced = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._lock(stack)
            # At the end of the file, whatever else happens to it.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._file = os.open(self.path, flags, 0o666)
            stack.callback(os.close, self._file)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise OSError(
                    errno.EINVAL, "expected a file", os.fspath(self.path)
                )
            if not overwrite:
                self._read()
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            os.fsync(self._file)
        finally:
            self._stack.close()

    def begin(self, prompts, settings):
        """Says what the answers are of, or checks that it is the same as ever.

        Args:
            prompts: str that differs between lists of prompts.
            settings: Dictionary of what else answers depend on.

        Raises:
            ValueError: If there are answers to other prompts or with other
                settings.
        """
        job = {"prompts": prompts, "settings": settings, "model": None}
        job = json.loads(json.dumps(job))
        if self.done:
            self._job = self._read_job()
            for name in ("prompts", "settings"):  # The model is not known.
                self._check(name, job[name])
        # Not before it is known whose file it is.
        os.ftruncate(self._file, self._end)
        os.write(self._file, self._missing)
        if not self.done:
            self._write_job(job)

    def claim(self, model):
        """The same, for the model. To be called before each answer.

        Args:
            model: Dictionary that differs between models.
        """
        if self._job["model"] is None:
            self._write_job({**self._job, "model": model})
        self._check("model", model)

    def write(self, answer):
        """Adds an answer, whole or not at all.

        Args:
            answer: Dictionary with an `"id"` and what else there is to keep.

        Raises:
            OSError: If the disk is full, say.
        """
        text = json.dumps(answer, ensure_ascii=False) + "\n"
        # Half of a surrogate pair becomes an escape of JSON's.
        line = text.encode(errors="backslashreplace")
        start = os.fstat(self._file).st_size
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._file, rest) :]
        finally:
            # What was interrupted knows best how far it came.
            if os.fstat(self._file).st_size != start + len(line):
                os.ftruncate(self._file, start)
        self.done.add(answer["id"])
        now = time.monotonic()
        if now - self._synced >= _SECONDS_BETWEEN_SYNCS:
            os.fsync(self._file)
            self._synced = now

    def _lock(self, stack):
        os.stat(self.path.parent)  # A lock would make the folder.
        lock = filelock.FileLock(
            self.path.with_name(f".{self.path.name}.lock"), timeout=0
        )
        try:
            stack.enter_context(lock)
        except filelock.Timeout as e:
            raise OSError(
                errno.EAGAIN, "another job writes to it", os.fspath(self.path)
            ) from e

    def _read(self):
        """Finds what is done, and whether the end was cut short."""
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                answer = _answer(line)
                is_whole = line.endswith(b"\n")
                if answer is not None:
                    self.done.add(answer["id"])
                    self._end += len(line)
                    self._missing = b"" if is_whole else b"\n"
                elif is_whole or not self._job_path.exists():
                    raise self._foreign(number)

    def _foreign(self, number):
        return ValueError(
            f"Expected {os.fspath(self.path)!r} to hold answers of a job, or "
            f"nothing. Received: a file in which line {number} is no answer. "
            "Remove the line to have its prompt answered again, name another "
            "file, or overwrite this one."
        )

    def _read_job(self):
        path = os.fspath(self._job_path)
        try:
            job = json.loads(self._job_path.read_bytes())
            if job["format"] != _FORMAT:
                raise ValueError(f"its format is {job['format']!r}")
            return {name: job[name] for name in _PARTS}
        except (FileNotFoundError, KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"Expected {path!r} to say what the answers in "
                f"{os.fspath(self.path)!r} are of. Received "
                f"{type(e).__name__}: {e}. Name another file for the answers, "
                "or overwrite these."
            ) from e

    def _write_job(self, job):
        with atomic_file.replacing(self._job_path) as unfinished:
            with open(unfinished, "w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, **job}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        self._job = job

    def _check(self, name, value):
        before = self._job[name]
        if before == value:
            return
        what = f"other {name}" if name != "model" else "another model"
        if isinstance(value, dict) and isinstance(before, dict):
            changed = sorted(
                key
                for key in value.keys() | before.keys()
                if value.get(key) != before.get(key)
            )
            what += ": " + ", ".join(
                f"{key}={value.get(key)!r}, before {before.get(key)!r}"
                for key in changed
            )
        raise ValueError(
            f"Expected to go on with the job that {os.fspath(self.path)!r} "
            f"holds {len(self.done)} answers of. Received {what}. Go on with "
            "what it began with, name another file for the answers, or "
            "overwrite these."
        )


def _answer(line):
    """What a line says, or `None` if it is not an answer."""
    try:
        x = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_answer = isinstance(x, dict) and isinstance(x.get("id"), (str, int))
    return x if is_answer else None
