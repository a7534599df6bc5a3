"""Kinds of models: what prompts of each are, and what a step reads of it.

A prompt is sent to systems as a dictionary of lists with an element for each
row, and read there as one of arrays. All kinds have `token_ids`, which
generation goes on with, and some of them more beside.
"""

import json
import pathlib
import re

import numpy as np


class Text:
    """A model that goes on with the text that it reads.

    Args:
        config: Dictionary, the `config.json` of a Hugging Face directory.
    """

    keras_task = "CausalLM"
    transformers_class = "AutoModelForCausalLM"
    # What `generate()` of each takes and returns of the text.
    keras_text = "token_ids"
    transformers_text = "input_ids"
    # Names, of Keras or of transformers, of weights that a prompt takes and no
    # step after it, as what they made of the prompt is in the cache.
    only_for_prompts = re.compile("(?!)")

    def __init__(self, config=None):
        self.config = config or {}

    def prompt(self, batch, length):
        """A prompt to send, always the same one.

        Args:
            batch: int. How many rows it has.
            length: int. How many tokens the model reads of text.
        """
        rng = np.random.default_rng(0)
        token_ids = rng.integers(100, 10_000, (batch, length))
        return {"token_ids": token_ids.tolist()}

    def read(self, prompt):
        """The arrays of a prompt that was sent."""
        return {name: np.asarray(x, "int32") for name, x in prompt.items()}

    def slots(self, length):
        """How many slots of the cache the prompt of a `length` takes."""
        return length

    def only_in_steps(self, named):
        """Those of `(name, x)`, weights or layers, that a step reads."""
        return [
            x for name, x in named if not self.only_for_prompts.search(name)
        ]

    def for_keras(self, prompt, after, known):
        """What a task of Keras takes.

        Args:
            prompt: Dictionary of arrays, from `read()`.
            after: int array `(B, T)`, the tokens after it.
            known: bool. Whether they are, or are to be generated.
        """
        token_ids = np.concatenate([prompt["token_ids"], after], axis=1)
        is_prompt = np.arange(token_ids.shape[1]) < prompt["token_ids"].shape[1]
        mask = np.tile(is_prompt | known, (len(token_ids), 1))
        return {"token_ids": token_ids, "padding_mask": mask}

    def for_transformers(self, prompt, after):
        """What a model of transformers takes, as arrays.

        Args:
            prompt: Dictionary of arrays, from `read()`.
            after: int array `(B, T)`, the tokens after it.
        """
        token_ids = np.concatenate([prompt["token_ids"], after], axis=1)
        token_ids = token_ids.astype("int64")
        return {
            "input_ids": token_ids,
            "attention_mask": np.ones_like(token_ids),
        }

    def options(self):
        """Options of `generate()` of transformers."""
        return {}


class EncoderDecoder(Text):
    """A model whose decoder begins a text of its own.

    Beside it, `source` is what the encoder reads.
    """

    keras_task = "Seq2SeqLM"
    transformers_class = "AutoModelForSeq2SeqLM"
    keras_text = "decoder_token_ids"
    transformers_text = "decoder_input_ids"
    # The encoder, and what makes keys and values of what it returned.
    only_for_prompts = re.compile(
        r"^(transformer_)?encoder_|cross_attention/(key|value)/|"
        r"\.encoder\.|\.encoder_attn\.[kv]_proj"
    )

    def prompt(self, batch, length):
        source = super().prompt(batch, length)["token_ids"]
        start = self.config["decoder_start_token_id"]
        return {"token_ids": [[start]] * batch, "source": source}

    def slots(self, length):
        return length + 1

    def for_keras(self, prompt, after, known):
        text = super().for_keras(prompt, after, known)
        source = prompt["source"]
        return {
            "encoder_token_ids": source,
            "encoder_padding_mask": np.ones(source.shape, bool),
            **{f"decoder_{name}": x for name, x in text.items()},
        }

    def for_transformers(self, prompt, after):
        text = super().for_transformers(prompt, after)
        source = super().for_transformers(
            {"token_ids": prompt["source"]}, after[:, :0]
        )
        return {**source, "decoder_input_ids": text["input_ids"]}


class ImageBeforeText(Text):
    """A model that reads an image, and goes on with the text after it.

    Beside it, `images` are what they are drawn with: those of a batch would be
    megabytes to send.
    """

    transformers_class = "AutoModelForImageTextToText"
    # The tower, and the projection of what it returned.
    only_for_prompts = re.compile(
        r"^image_(encoder|classifier)/|vision_tower|multi_modal_projector"
    )

    def prompt(self, batch, length):
        return {**super().prompt(batch, length), "images": list(range(batch))}

    def read(self, prompt):
        seeds = prompt["images"]
        size = self.config["vision_config"]["image_size"]
        images = [
            np.random.default_rng(x).uniform(-1, 1, (size, size, 3))
            for x in seeds
        ]
        return {
            **super().read({"token_ids": prompt["token_ids"]}),
            "images": np.asarray(images, "float32"),
        }

    @property
    def before(self):
        """How many tokens an image is."""
        return self.config["text_config"]["num_image_tokens"]

    def slots(self, length):
        return self.before + length

    def for_keras(self, prompt, after, known):
        inputs = super().for_keras(prompt, after, known)
        is_response = np.zeros(inputs["padding_mask"].shape, "int32")
        is_response[:, prompt["token_ids"].shape[1] :] = 1
        return {
            **inputs,
            "images": prompt["images"],
            "response_mask": is_response,
        }

    def for_transformers(self, prompt, after):
        image = self.config["image_token_index"]
        width = ((0, 0), (self.before, 0))
        ids = np.pad(prompt["token_ids"], width, constant_values=image)
        inputs = super().for_transformers({"token_ids": ids}, after)
        is_response = np.zeros_like(inputs["input_ids"])
        is_response[:, ids.shape[1] :] = 1
        return {
            **inputs,
            "pixel_values": prompt["images"].transpose(0, 3, 1, 2),
            "token_type_ids": is_response,
        }

    def options(self):
        # Which keras_hub has no logits for.
        return {"suppress_tokens": [self.config["image_token_index"]]}


_KINDS = {"bart": EncoderDecoder, "paligemma": ImageBeforeText}


def of(preset):
    """The kind of the model in a Hugging Face directory."""
    config = json.loads((pathlib.Path(preset) / "config.json").read_text())
    return _KINDS.get(config["model_type"], Text)(config)


def check_text(preset, command):
    """Ends the program unless a model reads text and nothing beside it."""
    kind = of(preset)
    if type(kind) is not Text:
        raise SystemExit(
            f"{command}: expected a model of text alone, since prompts have "
            f"nothing beside it. Received: {kind.config['model_type']!r}. "
            "Others have `speed`, `first-token` and `memory`."
        )
