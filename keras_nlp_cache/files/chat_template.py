"""Chat templates: how an instruction-tuned model expects a conversation.

A template is a program in Jinja that a preset carries. It is run in a sandbox,
with the functions that Hugging Face gives to templates.
"""

import datetime
import functools
import json
import pathlib

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from keras_hub.src.utils.preset_utils import get_file

_TEMPLATE = "chat_template.jinja"
# Where special tokens are written out, in files of Hugging Face.
_TOKENS = "special_tokens_map.json"
# Where templates stood before they had a file of their own.
_OLDER = ("tokenizer_config.json", "chat_template.json")
# Of several, the one that conversations without tools or documents are for.
_DEFAULT = "default"


class ChatTemplate:
    """What makes one text of the messages of a conversation.

    Args:
        source: str, in Jinja.
        special_tokens: Optional dictionary from names that the template knows,
            such as `"bos_token"`, to the text of these tokens.

    Raises:
        ValueError: If `source` is not a string.

    Example:
    ```python
    template = keras_nlp_cache.ChatTemplate(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template.render([{"role": "user", "content": "Hi!"}])
    ```

    Reference:
        https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(self, source, special_tokens=None):
        if not isinstance(source, str):
            raise ValueError(
                "Expected a chat template to be a string in Jinja. Received: "
                f"{source!r}."
            )
        self.source = source
        self.special_tokens = dict(special_tokens or {})

    def __repr__(self):
        return f"ChatTemplate({self.source!r}, {self.special_tokens!r})"

    @functools.cached_property
    def _compiled(self):
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(
                "Expected a chat template in Jinja. Received one with an error "
                f"in line {e.lineno}: {e.message}"
            ) from e

    def __getstate__(self):
        # What Jinja compiles cannot be pickled.
        return {"source": self.source, "special_tokens": self.special_tokens}

    def check(self):
        """Compiles the template.

        Raises:
            ValueError: If it is not Jinja.
        """
        _ = self._compiled

    def render(self, messages, add_generation_prompt=True, **variables):
        """Returns the text of a conversation.

        Args:
            messages: List of dictionaries with `"role"` and `"content"`.
            add_generation_prompt: bool. Whether the text goes on to where the
                answer of the model begins.
            **variables: What else the template is to know, such as
                `enable_thinking=False`, if it asks for that.

        Raises:
            ValueError: If the template raises an error, which it does for
                conversations that the model was not trained for.
        """
        variables = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **variables,
        }
        template = self._compiled
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as e:
            # A template is a program, and may fail as any.
            says = "It says" if isinstance(e, _Refused) else type(e).__name__
            raise ValueError(
                "Expected messages that the chat template of the model has a "
                f"form for. {says}: {e}"
            ) from e

    @classmethod
    def from_preset(cls, preset, of_keras=False):
        """Reads the template of a preset.

        Args:
            preset: A directory or a handle, of Keras or of Hugging Face, as
                keras_hub takes them.
            of_keras: bool. Whether it is a preset of Keras, in which there is
                no need to look for what only Hugging Face writes.

        Returns:
            A `ChatTemplate`, or `None` if the preset has none.
        """
        source = _text(preset, _TEMPLATE)
        for name in () if of_keras else _OLDER:
            if source is None:
                source = _default(_json(preset, name).get("chat_template"))
        if source is None:
            return None
        tokens = {}
        for name in (_TOKENS,) if of_keras else (_TOKENS, _OLDER[0]):
            tokens.update(_special_tokens(_json(preset, name)))
        return cls(source, tokens)

    def save(self, folder):
        """Writes the template beside a preset, under Hugging Face's names.

        Args:
            folder: str or path of a directory.
        """
        folder = pathlib.Path(folder)
        (folder / _TEMPLATE).write_text(self.source, "utf-8", newline="")
        (folder / _TOKENS).write_text(
            json.dumps(self.special_tokens, ensure_ascii=False, indent=4),
            "utf-8",
        )

    @staticmethod
    def remove(folder):
        """Removes what `save()` wrote to a folder, if anything."""
        for name in (_TEMPLATE, _TOKENS):
            (pathlib.Path(folder) / name).unlink(missing_ok=True)


def _special_tokens(config):
    """What a file of Hugging Face says of special tokens."""
    tokens = {}
    for name, token in config.items():
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    return tokens


def _default(template):
    """One template of what may be several with names."""
    if isinstance(template, list):
        template = {
            x.get("name"): x.get("template")
            for x in template
            if isinstance(x, dict)
        }
    if isinstance(template, dict):
        template = template.get(_DEFAULT)
    return template if isinstance(template, str) else None


def _json(preset, name):
    text = _text(preset, name)
    content = {} if text is None else json.loads(text)
    return content if isinstance(content, dict) else {}


def _text(preset, name):
    """The text of a file of a preset, `None` if there is none."""
    try:
        path = get_file(str(preset), name)
    except FileNotFoundError:
        return None
    except Exception:
        if "://" not in str(preset) and pathlib.Path(preset).is_dir():
            raise
        # Without a network there is no asking whether a file is there that
        # few presets have, and what can be loaded is in a cache.
        return None
    return pathlib.Path(path).read_bytes().decode("utf-8")


class _Refused(jinja2.TemplateError):
    """What a template raises by itself."""


def _raise_exception(message):
    raise _Refused(message)


def _strftime_now(format):
    return datetime.datetime.now().strftime(format)


def _to_json(x, ensure_ascii=False, **kwargs):
    # Jinja's own would escape what is markup in HTML.
    return json.dumps(x, ensure_ascii=ensure_ascii, **kwargs)


class _Generation(Extension):
    """The tag around what a model says itself, which changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(
            ("name:endgeneration",), drop_needle=True
        )
        return nodes.Scope(body, lineno=line)


@functools.cache
def _environment():
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now
    )
    return environment
