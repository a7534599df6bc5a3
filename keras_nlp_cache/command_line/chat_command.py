"""What `keras-nlp-cache chat` does: a dialogue in a terminal, or a pipe."""

import contextlib
import os
import pathlib
import sys

import platformdirs

from keras_nlp_cache.command_line.model_arguments import CommandError

_PROMPT = "> "
_HISTORY = "chat_history"
_HISTORY_LINES = 1000
# How many words commands take, at least and at most.
_ARGUMENTS = {"/rewind": (0, 1), "/save": (1, 1), "/load": (1, 1)}
_HELP = """\
/reset       forget what was said
/rewind [N]  forget the last turn, or the last N
/save FILE   write what was said to a .safetensors file
/load FILE   go on with such a file
/help        show this
/quit        leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with // says what follows one /."""


class Dialogue:
    """A conversation with a user, who types lines.

    Answers go to standard output, all else to standard error.

    Args:
        lm: A `CausalLM`, compiled.
        max_new_tokens: int. How long an answer may become.
        system: Optional str, what the model is told first.

    Attributes:
        session: The `Session` that keeps what was said.

    Raises:
        CommandError: If the model has no chat template, or has no words for
            `system`.
    """

    def __init__(self, lm, max_new_tokens, system=None):
        if lm.chat_template is None:
            raise CommandError(
                "expected a preset with a chat template, received one without; "
                "`keras-nlp-cache generate` goes on with any text"
            )
        self._lm, self._max_new_tokens = lm, max_new_tokens
        self._begin = []
        if system is not None:
            self._begin = [{"role": "system", "content": system}]
            with _explained():
                lm.chat_template.render(
                    [*self._begin, {"role": "user", "content": system}]
                )
        self._commands = {
            "/reset": self.reset,
            "/rewind": self.rewind,
            "/save": self.save,
            "/load": self.load,
            "/help": lambda: _tell(_HELP),
        }
        self.reset()

    def run(self):
        """Talks until the user leaves.

        Raises:
            CommandError: For the first mistake, where lines come from a pipe,
                and nobody is there to correct it.
            KeyboardInterrupt: If the user interrupts where nothing is said.
        """
        if not sys.stdin.isatty():
            self._talk(sys.stdin)
            return
        with _history():
            self._talk(_typed_lines(), is_terminal=True)

    def _talk(self, lines, is_terminal=False):
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                with _explained():
                    self._take(line)
            except CommandError as e:
                if not is_terminal:
                    raise
                _tell(f"error: {e}")

    def _take(self, line):
        if not line.startswith("/") or line.startswith("//"):
            if line:
                self._answer(line.removeprefix("/"))
            return
        name, *arguments = line.split(maxsplit=1)
        if name not in self._commands:
            raise CommandError(
                f"expected one of {', '.join([*self._commands, '/quit'])}, "
                f"received {name}"
            )
        fewest, most = _ARGUMENTS.get(name, (0, 0))
        if not fewest <= len(arguments) <= most:
            raise CommandError(
                f"expected {'a file' if fewest else 'nothing'} after {name}, "
                f"received {arguments[0] if arguments else 'nothing'}"
            )
        self._commands[name](*arguments)

    def _answer(self, line):
        pieces = self.session.stream_chat(line, self._max_new_tokens)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            _tell("\n[stopped]")
        else:
            print(flush=True)

    def reset(self):
        """Forgets all that was said."""
        self.session = self._lm.start_session()
        self.session.messages = self._begin

    def rewind(self, count="1"):
        """Forgets the last turns."""
        try:
            count = int(count)
        except ValueError as e:
            raise CommandError(
                f"expected a number after /rewind, received {count}"
            ) from e
        self.session.rewind_turn(count)
        self._tell_turns()

    def save(self, path):
        """Writes what was said to a file."""
        with _explained():
            self.session.save(pathlib.Path(path).expanduser())
        self._tell_turns("saved, ")

    def load(self, path):
        """Goes on with what was said in a file."""
        with _explained():
            self.session.load(pathlib.Path(path).expanduser())
        self._tell_turns("loaded, ")

    def _tell_turns(self, done=""):
        turns = sum(x["role"] == "user" for x in self.session.messages)
        _tell(f"[{done}{turns} turn{'' if turns == 1 else 's'}]")


def _tell(text):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _explained():
    try:
        yield
    except (OSError, ValueError) as e:
        if isinstance(e, BrokenPipeError):
            raise
        raise CommandError(e) from e


def _typed_lines():
    while True:
        try:
            line = input(_PROMPT)
        except EOFError:
            _tell("")
            return
        yield line


@contextlib.contextmanager
def _history():
    """Keeps what is typed, to be edited and found again next time."""
    try:
        import readline
    except ImportError:  # Not on all systems. Lines can be typed without.
        yield
        return
    folder = platformdirs.user_data_path("keras-nlp-cache")
    path = os.fspath(folder / _HISTORY)
    # A dialogue is no worse for a history that cannot be kept.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
