"""Chat templates say what they say in transformers, and go with a preset."""

import json
import pickle
import re

import keras_hub
import pytest
import tokenizers
import transformers

import keras_nlp_cache
from keras_nlp_cache import models
from keras_nlp_cache import surgery
from keras_nlp_cache.files.chat_template import ChatTemplate
from tests import gguf_files
from tests.families import FAMILIES
from tests.families import on_one_backend

LLAMA3 = FAMILIES[4]
USER = {"role": "user", "content": " Hi <b>you</b> & 'me'!  "}
ANSWER = {"role": "assistant", "content": "\tHello.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN = {"role": "user", "content": "Ça va? 你好"}

# Shapes of what is in use, in words of our own.
CHATML = """\
{% for message in messages %}
    {% if loop.first and message.role != "system" %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
{{ "<|im_start|>" + message["role"] + "\\n" + message["content"] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
LLAMA_3_LIKE = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- bos_token + "<|head|>system<|tail|>\\n\\n" }}
{%- if tools is not none %}{{ "Tools: " + tools | tojson }}{% endif %}
{{- "Year: " + strftime_now("%Y") + "\\n" + system + "<|eot|>" }}
{%- for message in messages %}
    {{- "<|head|>" + message["role"] + "<|tail|>\\n\\n" }}
    {{- message["content"] | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|head|>assistant<|tail|>\\n\\n" }}
{%- endif %}
"""
GEMMA_LIKE = """\
{{ bos_token }}{% if messages[0]["role"] == "system" %}
{{ raise_exception("There is no system here") }}{% endif %}
{% for message in messages %}
{% if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
{{ raise_exception("Take turns") }}
{% endif %}
{% set role = "model" if message["role"] == "assistant" else message["role"] %}
{{ "<turn>" + role + "\\n" + message["content"] | trim + "</turn>\\n" }}
{% endfor %}{% if add_generation_prompt %}{{ "<turn>model\\n" }}{% endif %}
"""
LOOPS = """\
{%- set found = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- set found.count = found.count + 1 %}
    {%- if found.count > 2 %}{% break %}{% endif %}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {{- message | tojson(indent=1) }} {{ message.content | tojson }}
        {{- unknown_token }}{{ mood | default("calm") }}
    {%- endif %}
{%- endfor %}
{%- macro last(x) %}{{ x[-1].content.strip().split(" ")[0] }}{% endmacro %}
{{- last(messages) }}
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA_3_LIKE,
    "gemma": GEMMA_LIKE,
    "loops": LOOPS,
}
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, AGAIN],
    [SYSTEM, USER, ANSWER, AGAIN],
    [USER, ANSWER],
    [USER, USER],
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference():
    vocabulary = {"<s>": 0, "</s>": 1}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel(vocabulary, unk_token="<s>")
        ),
        **TOKENS,
    )


@on_one_backend("templates are rendered")
@pytest.mark.parametrize("name", TEMPLATES)
def test_they_say_what_they_say_in_transformers(name, reference):
    refused = 0
    for messages in CONVERSATIONS:
        for options in ({}, {"add_generation_prompt": True}, {"mood": "glad"}):
            options = {"add_generation_prompt": False, **options}
            template = ChatTemplate(TEMPLATES[name], TOKENS)
            try:
                expected = reference.apply_chat_template(
                    messages,
                    chat_template=TEMPLATES[name],
                    tokenize=False,
                    **options,
                )
            except Exception as e:
                refused += 1
                with pytest.raises(ValueError, match=re.escape(str(e))):
                    template.render(messages, **options)
            else:
                assert template.render(messages, **options) == expected
    # Two with a system and one out of turn, each three times.
    assert refused == (9 if name == "gemma" else 0)


@on_one_backend("templates are rendered")
def test_what_they_raise_is_said():
    template = ChatTemplate(GEMMA_LIKE, TOKENS)
    with pytest.raises(ValueError, match="It says: There is no system here"):
        template.render([SYSTEM, USER])
    with pytest.raises(ValueError, match="UndefinedError"):
        template.render([])
    with pytest.raises(ValueError, match="in line 2.*endif"):
        ChatTemplate("{% if x %}\n{% endfor %}").check()
    with pytest.raises(ValueError, match="a string in Jinja.*None"):
        ChatTemplate(None)
    for escape in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(ValueError, match="SecurityError"):
            ChatTemplate(escape).render([USER])


def write(folder, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, "utf-8")


FILES = {
    "its config": ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
    "a file of its own": (
        {
            "tokenizer_config.json": {"chat_template": "a"},
            "chat_template.jinja": "b\n",
        },
        "b\n",
    ),
    "that of its processor": (
        {"chat_template.json": {"chat_template": "c"}},
        "c",
    ),
    "one of several": (
        {
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool_use", "template": "d"},
                    {"name": "default", "template": "e"},
                ]
            }
        },
        "e",
    ),
    "none": ({"tokenizer_config.json": {"chat_template": None}}, None),
    "none of its kind": (
        {"tokenizer_config.json": {"chat_template": [{"name": "rag"}]}},
        None,
    ),
    "nothing": ({}, None),
}


@on_one_backend("files are read")
@pytest.mark.parametrize("kind", FILES)
def test_where_they_stand(kind, tmp_path):
    files, expected = FILES[kind]
    for name, content in files.items():
        write(tmp_path, name, content)
    template = ChatTemplate.from_preset(str(tmp_path))
    assert (template and template.source) == expected


@on_one_backend("files are read")
def test_special_tokens_in_files(tmp_path):
    tokens = {
        "bos_token": None,
        "eos_token": {"content": "</s>", "special": True},
        "image_token": "<image>",
        "add_bos_token": True,
        "model_max_length": 8,
    }
    write(tmp_path, "tokenizer_config.json", {**tokens, "chat_template": "x"})
    write(tmp_path, "special_tokens_map.json", {"pad_token": "<pad>"})
    template = ChatTemplate.from_preset(str(tmp_path))
    assert template.special_tokens == {
        "eos_token": "</s>",
        "image_token": "<image>",
        "pad_token": "<pad>",
    }


def test_they_go_with_a_preset(tmp_path):
    gguf_files.write(tmp_path / "x.gguf", "llama3")
    lm = models.CausalLM.from_preset(tmp_path / "x.gguf")
    assert lm.chat_template.source == gguf_files.CHAT_TEMPLATE
    expected = lm.chat_template.render([USER])
    assert expected == "<|begin_of_text|>" + USER["content"]
    folder = tmp_path / "preset"
    lm.save_to_preset(folder)
    again = models.CausalLM.from_preset(str(folder))
    assert again.chat_template.render([USER]) == expected
    upstream = keras_hub.models.CausalLM.from_preset(str(folder))
    assert type(upstream) is keras_hub.models.Llama3CausalLM
    # What is saved over it has none.
    lm.chat_template = None
    lm.save_to_preset(folder)
    assert models.CausalLM.from_preset(str(folder)).chat_template is None
    assert not list(folder.glob("*.jinja"))


def test_they_go_with_a_file_of_keras(tmp_path):
    lm = LLAMA3.text_lm()
    path = tmp_path / "lm.keras"
    for template in ("{{ bos_token }}", None):
        lm.chat_template = template
        lm.save(path)
        again = keras_nlp_cache.load_model(path)
        copy = pickle.loads(pickle.dumps(lm))
        for x in (again, copy):
            found = x.chat_template and x.chat_template.render([USER])
            assert found == ("<|begin_of_text|>" if template else None)


def test_users_assign_them():
    lm = LLAMA3.text_lm()
    assert lm.chat_template is None
    lm.chat_template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    expected = "<|begin_of_text|>x<|end_of_text|>"
    message = {"role": "user", "content": "x"}
    assert lm.chat_template.render([message]) == expected
    edited = surgery.remove(lm, 0)
    assert edited.chat_template is lm.chat_template
    for wrong, words in (("{% if %}", "in line 1"), (3, "Jinja. Received: 3")):
        with pytest.raises(ValueError, match=words):
            lm.chat_template = wrong
    assert lm.chat_template is edited.chat_template
    # Special tokens are those that were there.
    lm.chat_template = ChatTemplate("", {"bos_token": "<s>"})
    lm.chat_template = "{{ bos_token }}"
    assert lm.chat_template.render([message]) == "<s>"
    template = pickle.loads(pickle.dumps(lm.chat_template))
    assert template.render([message]) == "<s>"
    assert keras_nlp_cache.ChatTemplate is ChatTemplate
