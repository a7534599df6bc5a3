"""Prompts in a file of JSON lines: looked through once, then read."""

import errno
import hashlib
import json
import os
from typing import NamedTuple

_KEYS = ("prompt", "messages", "id", "max_new_tokens", "seed")
# More mistakes than this are not listed, only counted.
_LISTED = 5


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        index: int. How many prompts stand before it.
        id: str or int. What the line says, or its number.
        asked: What the model is to go on from, as `generate_many()` takes it: a
            dictionary with a string or token ids, and more. What is drawn for
            it depends on its index, wherever a job was begun.
    """

    index: int
    id: str | int
    asked: object


class PromptsFile:
    """A file with one prompt in each line, all of them found to be in order.

    Args:
        path: str or path.
        chat_prompt: Optional function from a list of messages, dictionaries
            with a `"role"` and a `"content"`, to a text or token ids. What it
            raises a
            `ValueError` for is no prompt. Without it, prompts are passed on as
            they are, and messages refused.

    Attributes:
        count: int. How many prompts there are.
        digest: str. Differs between files with different prompts or ids.

    Raises:
        ValueError: If lines are no prompts, with their numbers, or there are
            no prompts at all.
        OSError: If the file cannot be read.
    """

    def __init__(self, path, chat_prompt=None):
        self.path, self._chat_prompt = path, chat_prompt
        self._file = open(path, "rb")
        try:
            self._look_through()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __iter__(self):
        """Yields each `Prompt`. They are read as they are asked for."""
        self._file.seek(0)
        try:
            # Lines that somebody has added since are left alone.
            for index, (_, id, _, asked) in zip(
                range(self.count), self._lines()
            ):
                if "seed" not in asked:
                    asked = {**asked, "stream": index}
                yield Prompt(index, id, asked)
        except ValueError as e:
            raise OSError(
                errno.ESTALE,
                f"expected the prompts not to change under a job; {e}",
                os.fspath(self.path),
            ) from e

    def _look_through(self):
        digest, lines, mistakes = hashlib.sha256(), {}, []
        for number, id, said, _ in self._lines(mistakes):
            if id in lines:
                mistakes.append(
                    f"line {number}: expected an id of its own, received "
                    f"{json.dumps(id)}, as line {lines[id]} has; a line "
                    "without an id is called by its number"
                )
            lines[id] = number
            # Not the texts: a template may put the day into them.
            digest.update(json.dumps([id, said]).encode())
        if mistakes:
            more = len(mistakes) - _LISTED
            raise ValueError(
                f"Expected a prompt in each line of {os.fspath(self.path)!r}. "
                "Received:\n"
                + "\n".join(mistakes[:_LISTED])
                + (f"\nand {more} more" if more > 0 else "")
            )
        if not lines:
            raise ValueError(
                "Expected prompts, lines such as "
                '{"prompt": "Who are you?"}. Received: '
                f"{os.fspath(self.path)!r}, which has none."
            )
        self.count, self.digest = len(lines), digest.hexdigest()

    def _lines(self, mistakes=None):
        """Yields the lines that are not blank.

        Each is `(number, id, said, asked)`.

        Args:
            mistakes: Optional list, to add what is wrong to rather than raise
                it.
        """
        for number, line in enumerate(self._file, 1):
            if not line.strip():
                continue
            try:
                yield number, *self._prompt(number, line)
            except ValueError as e:
                if mistakes is None:
                    raise
                mistakes.append(f"line {number}: {e}")

    def _prompt(self, number, line):
        # Some editors begin a file by saying that it is UTF-8.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        try:
            x = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(
                f"expected JSON, received what is none: {e}"
            ) from e
        if not isinstance(x, dict):
            raise _unlike('an object with a "prompt"', x)
        unknown = sorted(x.keys() - set(_KEYS))
        if unknown:
            raise _unlike(f"the keys {', '.join(_KEYS)} and no others", unknown)
        id = x.get("id", number)
        if isinstance(id, bool) or not isinstance(id, (str, int)):
            raise _unlike("an id that is a string or an integer", id)
        _check_text(str(id))
        if ("prompt" in x) == ("messages" in x):
            raise _unlike('either a "prompt" or "messages"', sorted(x))
        if "prompt" in x:
            _check_text(x["prompt"])
            messages = [{"role": "user", "content": x["prompt"]}]
        else:
            messages = _checked_messages(x["messages"])
        further = {
            key: _checked_number(key, x[key])
            for key in ("max_new_tokens", "seed")
            if key in x
        }
        said = [messages, further] if further else messages
        if self._chat_prompt is not None:
            asked = self._chat_prompt(messages)
        elif "prompt" in x:
            asked = x["prompt"]
        else:
            raise ValueError(
                'expected a "prompt", as prompts are passed on as they are, '
                'received "messages", which take a chat template'
            )
        return id, said, {"prompt": asked, **further}


def _checked_number(key, x):
    least = 1 if key == "max_new_tokens" else 0
    if isinstance(x, bool) or not isinstance(x, int) or x < least:
        raise _unlike(f'a "{key}" that is an integer of {least} or more', x)
    return x


def _checked_messages(messages):
    if not isinstance(messages, list) or not messages:
        raise _unlike('a list of messages with "role" and "content"', messages)
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise _unlike('messages with "role" and "content"', message)
        for value in message.values():
            _check_text(value)
    return messages


def _check_text(x):
    if not isinstance(x, str):
        raise _unlike("a string", x)
    try:
        x.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"expected Unicode text, received {x!r}") from e


def _unlike(expected, received):
    received = json.dumps(received)
    if len(received) > 80:
        received = received[:77] + "..."
    return ValueError(f"expected {expected}, received {received}")
