"""Puts a question into the form that an instruction-tuned model expects."""

import json
import pathlib

from jinja2.sandbox import ImmutableSandboxedEnvironment

from keras_nlp_cache.files import gguf_preset


def chat_prompt(preset, question, start_token=None):
    """Formats a question with the chat template of a preset.

    Args:
        preset: str. A preset, as for `CausalLM.from_preset()`. Only local
            Hugging Face directories and GGUF files carry a template.
        question: str.
        start_token: Optional str. The token that the preprocessor will put
            first. If the template begins with it too, it is left out here.

    Returns:
        The prompt, or `question` as it is if the preset has no template.
    """
    template, variables = _template(pathlib.Path(gguf_preset.directory(preset)))
    if template is None:
        return question
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )
    prompt = environment.from_string(template).render(
        messages=[{"role": "user", "content": question}],
        add_generation_prompt=True,
        **variables,
    )
    return prompt.removeprefix(start_token or "")


def _template(folder):
    """The template of a Hugging Face directory and its special tokens."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None, {}
    config = json.loads(path.read_text(encoding="utf-8"))
    template = config.get("chat_template")
    path = folder / "chat_template.jinja"
    if path.is_file():
        template = path.read_text(encoding="utf-8")
    if not isinstance(template, str):
        return None, {}
    tokens = {
        name: _text(config.get(name, ""))
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    return template, tokens


def _text(token):
    return token["content"] if isinstance(token, dict) else token
