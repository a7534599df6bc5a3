"""Small random models of transformers, one or more for each family.

Their options are chosen to matter: windows shorter than the prompts of the
tests, positions that are rescaled, an epsilon that shows, keys that queries
share, and every kind of layer that a family has.
"""

import dataclasses
import functools
import json
import pathlib
import re
import types
import typing
from unittest import mock

import keras
import numpy as np
import safetensors.torch
import torch
import transformers
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import (
    convert_arch_def_to_stackwise,
)
from keras_hub.src.utils.transformers import convert_gemma3n
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n import modeling_gemma3n

from tests.families import IMAGES

PROMPT_LENGTH = 20
NEW_TOKENS = 24
MAX_LENGTH = PROMPT_LENGTH + NEW_TOKENS
WINDOW = 6


@dataclasses.dataclass(frozen=True)
class Family:
    """A small model of transformers, and what reads it here.

    Attributes:
        prefix: What the names of the classes in `models` begin with.
        config: The configuration of transformers.
        arguments: Function from that to the arguments of a backbone, for
            families that keras_hub has no converter for.
        weights: Generator of pairs of a variable and its value, given a
            backbone and a function that looks up a weight. As `arguments`.
    """

    prefix: str
    config: transformers.PreTrainedConfig
    arguments: callable = None
    weights: callable = None
    kind: typing.ClassVar[str] = "CausalLM"
    auto_class: typing.ClassVar[type] = transformers.AutoModelForCausalLM

    @functools.cached_property
    def model(self):
        """The model, made once, with weights that make attention matter."""
        torch.manual_seed(0)
        model = self.auto_class.from_config(self.config)
        with torch.no_grad():
            # Its six layers would round away what is compared.
            deep = self.config.model_type.startswith("gemma3")
            for name, parameter in model.named_parameters():
                scale = 0.5 if parameter.ndim > 1 else 0.3
                if any(x in name for x in ("embed", "wte", "wpe")):
                    # What the layers add is to outweigh the last token.
                    scale = 0.1 if deep else 0.2
                of_tower = "vision" in name or "visual" in name
                if of_tower and parameter.ndim > 1:
                    # Whose rounding is enlarged by all that follows.
                    scale = 0.2
                value = scale * torch.randn_like(parameter)
                if parameter.ndim == 1 and name.endswith(".weight"):
                    value += not deep
                # As in a file of half precision, which a converter expects.
                parameter.copy_(value.bfloat16())
                if _is_packed(name, self.config):
                    parameter.copy_(_Packed(parameter).values)
        return model.eval()

    def save(self, folder):
        """Writes a directory as those of Hugging Face, without a tokenizer."""
        folder = pathlib.Path(folder)
        self.model.save_pretrained(folder)
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        for name in [x for x in tensors if _is_packed(x, self.config)]:
            packed = _Packed(tensors.pop(name))
            tensors[f"{name}_blocks"] = packed.blocks
            tensors[f"{name}_scales"] = packed.scales
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    def load(self, models, folder):
        """Returns the same model as a task of `models`.

        Args:
            models: A module, `keras_nlp_cache.models` or `keras_hub.models`.
            folder: Where it was saved.
        """
        task = getattr(models, f"{self.prefix}{self.kind}")
        if self.arguments is None:
            return task.from_preset(str(folder), preprocessor=None)
        backbone = getattr(models, f"{self.prefix}Backbone")(
            **self.arguments(self.config)
        )
        weights = self.model.state_dict()
        unread = {
            name
            for name in set(weights) - _SHARED
            if not any(part in name for part in _OF_IMAGES)
        }

        def read(name):
            unread.discard(name)
            return weights[name].numpy()

        given = set()
        for variable, value in self.weights(backbone, read):
            variable.assign(np.reshape(value, variable.shape))
            given.add(id(variable))
        assert not unread, unread
        assert all(id(x) in given for x in backbone.weights)
        return task(backbone=backbone, preprocessor=None)

    def logits(self, token_ids, padding_mask):
        with torch.no_grad():
            return self.model(
                torch.tensor(token_ids).long(),
                attention_mask=torch.tensor(padding_mask).long(),
            ).logits.numpy()

    def greedy(self, token_ids):
        """Token ids with those that transformers itself continues them by."""
        token_ids = torch.tensor(token_ids).long()
        return self.model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()


# The same as others.
_SHARED = {
    "lm_head.weight",
    "lm_head.out_proj.weight",
    "proj_out.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
}
_OF_IMAGES = ("vision_tower", "multi_modal_projector", "eoi_embedding")


class _Packed:
    """Numbers of four bits each, 32 of which share a scale of eight bits.

    Args:
        tensor: Float tensor `(experts, inputs, outputs)`, of numbers which
            are rounded to some that can be packed.
    """

    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    exponent = -3

    def __init__(self, tensor):
        values = tensor.float().mT / 2**self.exponent
        codes = (values.abs()[..., None] - self.magnitudes).abs().argmin(-1)
        rounded = self.magnitudes[codes] * values.sign()
        self.values = (rounded * 2**self.exponent).mT.contiguous()
        codes = (codes + 8 * (values < 0)).to(torch.uint8)
        codes = codes.unflatten(-1, (-1, 16, 2))
        self.blocks = codes[..., 0] + 16 * codes[..., 1]
        self.scales = torch.full(
            self.blocks.shape[:-1], 127 + self.exponent, dtype=torch.uint8
        )


def _is_packed(name, config):
    # GPT-OSS is published so, and the converter reads nothing else.
    return config.model_type == "gpt_oss" and name.endswith(
        ("gate_up_proj", "down_proj")
    )


class OfSeveralMedia(Family):
    """A small model of text, in a file as of one that sees images, too."""

    def save(self, folder):
        super().save(folder)
        path = pathlib.Path(folder) / "config.json"
        config = json.loads(path.read_text())
        config["model_type"] = config["model_type"].removesuffix("_text")
        path.write_text(json.dumps(config))
        path = pathlib.Path(folder) / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors = {
            re.sub(r"^model\.", "model.language_model.", name): x
            for name, x in tensors.items()
        }
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


class EncoderDecoder(Family):
    """A small model with an encoder, which reads a source."""

    kind = "Seq2SeqLM"
    auto_class = transformers.AutoModelForSeq2SeqLM
    # With which transformers begins what it generates.
    start = 2
    # What its encoder reads beside its text.
    beside = types.MappingProxyType({})

    def save(self, folder):
        super().save(folder)
        # keras_hub reads what transformers 5 does not write any more.
        path = pathlib.Path(folder) / "config.json"
        config = json.loads(path.read_text())
        layers = config.get("encoder_layers")
        if layers is not None:
            path.write_text(json.dumps({**config, "num_hidden_layers": layers}))

    def logits(self, source, source_mask, token_ids):
        with torch.no_grad():
            return self.model(
                input_ids=torch.tensor(source).long(),
                attention_mask=torch.tensor(source_mask).long(),
                decoder_input_ids=torch.tensor(token_ids).long(),
            ).logits.numpy()

    def greedy(self, source, source_mask, token_ids):
        return self.model.generate(
            torch.tensor(source).long(),
            attention_mask=torch.tensor(source_mask).long(),
            decoder_input_ids=torch.tensor(token_ids).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()


class FromSound(EncoderDecoder):
    """A small model whose encoder reads sound, `(B, samples, 1)`."""

    kind = "AudioToText"
    auto_class = transformers.AutoModelForSpeechSeq2Seq

    def logits(self, source, source_mask, token_ids):
        with torch.no_grad():
            return self.model(
                input_values=torch.tensor(source[:, :, 0]),
                decoder_input_ids=torch.tensor(token_ids).long(),
            ).logits.numpy()

    def greedy(self, source, source_mask, token_ids):
        return self.model.generate(
            input_values=torch.tensor(source[:, :, 0]),
            decoder_input_ids=torch.tensor(token_ids).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()


class ImageText(Family):
    """A small model that reads images with its text."""

    auto_class = transformers.AutoModelForImageTextToText

    def save(self, folder):
        super().save(folder)
        # keras_hub reads what transformers 5 calls otherwise.
        path = pathlib.Path(folder) / "model.safetensors"
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model."): x
            for name, x in safetensors.torch.load_file(path).items()
        }
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    @property
    def before(self):
        """How many tokens an image takes before the text."""
        return self.config.text_config.num_image_tokens

    def our_inputs(self, images, token_ids, padding_mask):
        return {
            "images": images,
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "response_mask": np.zeros_like(padding_mask),
        }

    def inputs(self, images, token_ids, padding_mask):
        """What transformers takes for images and texts that follow them."""
        width = ((0, 0), (self.before, 0))
        image = self.config.image_token_id
        token_ids = np.pad(token_ids, width, constant_values=image)
        mask = np.pad(padding_mask, width, constant_values=1)
        return dict(
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            input_ids=torch.tensor(token_ids).long(),
            attention_mask=torch.tensor(mask).long(),
            # All of it is a prompt.
            token_type_ids=torch.zeros(mask.shape).long(),
        )

    def logits(self, images, token_ids, padding_mask):
        with torch.no_grad():
            inputs = self.inputs(images, token_ids, padding_mask)
            logits = self.model(**inputs).logits.numpy()
        return logits[:, self.before :, : self.config.image_token_id]

    def greedy(self, images, token_ids):
        inputs = self.inputs(images, token_ids, np.ones_like(token_ids))
        generated = self.model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            # Which keras_hub's has no logits for.
            suppress_tokens=[self.config.image_token_id],
        )
        return generated.numpy()[:, self.before :]


class WithQFormer(ImageText):
    """A small model with a Q-Former between images and text."""

    def save(self, folder):
        Family.save(self, folder)

    @property
    def before(self):
        return self.config.num_query_tokens

    def our_inputs(self, images, token_ids, padding_mask):
        inputs = super().our_inputs(images, token_ids, padding_mask)
        return {k: x for k, x in inputs.items() if k != "response_mask"}

    def inputs(self, images, token_ids, padding_mask):
        inputs = super().inputs(images, token_ids, padding_mask)
        return {k: x for k, x in inputs.items() if k != "token_type_ids"}


class ImagesBeforeSource(EncoderDecoder, WithQFormer):
    """A small model whose encoder reads images before its text."""

    auto_class = transformers.AutoModelForImageTextToText
    start = 0
    beside = {"images": IMAGES}

    def save(self, folder):
        super().save(folder)
        # Which transformers 5 has and the published files have not in common.
        path = pathlib.Path(folder) / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        head = tensors["language_model.shared.weight"].clone()
        tensors["language_model.lm_head.weight"] = head
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    def logits(self, source, source_mask, token_ids):
        with torch.no_grad():
            return self.model(
                **self.inputs(IMAGES, source, source_mask),
                decoder_input_ids=torch.tensor(token_ids).long(),
            ).logits.numpy()

    def greedy(self, source, source_mask, token_ids):
        return self.model.generate(
            **self.inputs(IMAGES, source, source_mask),
            decoder_input_ids=torch.tensor(token_ids).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()


class ImagesInText(ImageText):
    """A small model in whose text images stand."""

    before = 0
    # Where in the text of each row.
    indices = np.arange(4) + np.array([[1], [7]])

    def our_inputs(self, images, token_ids, padding_mask):
        mask = np.zeros_like(padding_mask)
        np.put_along_axis(mask, self.indices, 1, axis=1)
        return {
            "images": images[:, None],
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "vision_indices": self.indices.astype("int32"),
            "vision_mask": mask,
        }

    def inputs(self, images, token_ids, padding_mask):
        mask = np.zeros_like(padding_mask)
        np.put_along_axis(mask, self.indices, 1, axis=1)
        image = self.config.image_token_id
        return dict(
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            input_ids=torch.tensor(np.where(mask, image, token_ids)).long(),
            attention_mask=torch.tensor(padding_mask).long(),
            token_type_ids=torch.tensor(mask).long(),
        )

    def greedy(self, images, token_ids):
        generated = super().greedy(images, token_ids)
        # Nobody looks at what stands in the place of an image.
        np.put_along_axis(
            generated,
            self.indices,
            np.take_along_axis(token_ids, self.indices, axis=1),
            axis=1,
        )
        return generated


class PatchesInText(ImagesInText):
    """A small model in whose text images stand, as patches, and sound.

    A clip in each row, of three tokens and of two.
    """

    clips = np.random.default_rng(7).normal(size=(2, 1, 12, 128))
    clips = clips.astype("float32")
    frames = (np.arange(12) < np.array([[[12]], [[8]]])).astype("int32")
    places = np.array([[6, 7, 8], [2, 3, 0]], "int32")

    def save(self, folder):
        Family.save(self, folder)

    def our_inputs(self, images, token_ids, padding_mask):
        inputs = super().our_inputs(images, token_ids, padding_mask)
        del inputs["images"]
        # Rows and columns of patches, row by row.
        x = images.reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3)
        places = np.stack(np.divmod(np.arange(16), 4)[::-1], axis=-1)
        return {
            **inputs,
            "pixel_values": x.reshape(-1, 1, 16, 48),
            "pixel_position_ids": np.tile(places, (len(x), 1, 1, 1)),
            "audio_mel": self.clips,
            "audio_mel_mask": self.frames,
            "audio_indices": self.places,
            "audio_mask": self.of_clips(token_ids).astype("int32"),
        }

    def of_clips(self, token_ids):
        """Which tokens are of clips."""
        columns = np.arange(token_ids.shape[1])
        inside = columns == np.where(self.places, self.places, -1)[..., None]
        return inside.any(axis=1)

    def inputs(self, images, token_ids, padding_mask):
        ours = self.our_inputs(images, token_ids, padding_mask)
        inputs = super().inputs(images, token_ids, padding_mask)
        of_clips = torch.tensor(ours["audio_mask"]) != 0
        ids = inputs["input_ids"]
        return dict(
            input_ids=ids.masked_fill(of_clips, self.config.audio_token_id),
            attention_mask=inputs["attention_mask"],
            input_features=torch.tensor(self.clips[:, 0]),
            input_features_mask=torch.tensor(self.frames[:, 0]) != 0,
            pixel_values=torch.tensor(ours["pixel_values"][:, 0]),
            image_position_ids=torch.tensor(ours["pixel_position_ids"][:, 0]),
            mm_token_type_ids=inputs["token_type_ids"].masked_fill(of_clips, 3),
        )

    def greedy(self, images, token_ids):
        generated = super().greedy(images, token_ids)
        of_clips = self.of_clips(token_ids)
        start = generated[:, : token_ids.shape[1]]
        start[of_clips] = token_ids[of_clips]
        return generated


class ImagesByToken(ImagesInText):
    """A small model that sees with what keras_hub builds.

    The tower of transformers is another project's, which is not installed. Here
    it has that of the backbone that it is compared with. All that follows it is
    that of transformers, the projection of features, say.
    """

    @functools.cached_property
    def model(self):
        auto_model = mock.Mock()
        auto_model.from_config = lambda config, **kwargs: (
            _Seeing()
            if config.model_type == "gemma3n_vision"
            else transformers.AutoModel.from_config(config, **kwargs)
        )
        with mock.patch.object(modeling_gemma3n, "AutoModel", auto_model):
            return Family.model.func(self)

    def save(self, folder):
        """Nothing: keras_hub's converter reads towers of one size alone."""

    def load(self, models, folder):
        lm = super().load(models, folder)
        self.model.model.vision_tower.tower.append(lm.backbone.vision_encoder)
        return lm

    def our_inputs(self, images, token_ids, padding_mask):
        inputs = super().our_inputs(images, token_ids, padding_mask)
        image = self.config.image_token_id
        token_ids = np.where(inputs["vision_mask"], image, token_ids)
        return {**inputs, "token_ids": token_ids}

    def inputs(self, images, token_ids, padding_mask):
        inputs = super().inputs(images, token_ids, padding_mask)
        return {k: x for k, x in inputs.items() if k != "token_type_ids"}

    def greedy(self, images, token_ids):
        # Of images, there are logits of tokens, too.
        inputs = self.inputs(images, token_ids, np.ones_like(token_ids))
        return self.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False
        ).numpy()

    def logits(self, images, token_ids, padding_mask):
        with torch.no_grad():
            inputs = self.inputs(images, token_ids, padding_mask)
            return self.model(**inputs).logits.numpy()


class _Seeing(torch.nn.Module):
    """Sees with a layer of Keras, the one in its list."""

    def __init__(self):
        super().__init__()
        self.tower = []

    def forward(self, pixel_values, **kwargs):
        (tower,) = self.tower
        seen = tower(pixel_values.permute(0, 2, 3, 1).numpy())
        seen = torch.tensor(keras.ops.convert_to_numpy(seen))
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.permute(0, 3, 1, 2)
        )


class ImagesInGrids(Family):
    """A small model in whose text images of any size stand, in grids."""

    auto_class = transformers.AutoModelForImageTextToText
    # How many patches images have, and where in the text of each row their
    # tokens stand, four patches each.
    grids = (((1, 4, 4), (1, 2, 2)), ((1, 2, 4), (1, 2, 6)))
    places = ((1, 2, 3, 4, 6), (7, 8, 10, 11, 12))

    def our_inputs(self, token_ids, padding_mask):
        grids = np.array(self.grids)
        count = grids[0].prod(axis=1).sum()
        rng = np.random.default_rng(4)
        first = token_ids.shape[1] * np.arange(2)[:, None]
        return {
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "pixel_values": rng.uniform(size=(2, count, 2, 4, 4, 3)),
            "image_grid_thw": grids,
            "vision_indices": np.array(self.places) + first,
        }

    def inputs(self, token_ids, padding_mask):
        """What transformers takes for the same images and texts."""
        ours = self.our_inputs(token_ids, padding_mask)
        of_images = np.zeros_like(token_ids)
        of_images.flat[ours["vision_indices"].reshape(-1)] = 1
        ids = np.where(of_images, self.config.image_token_id, token_ids)
        pixels = np.concatenate(ours["pixel_values"]).transpose(0, 4, 1, 2, 3)
        return dict(
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.tensor(padding_mask).long(),
            pixel_values=torch.tensor(pixels).float().flatten(1),
            image_grid_thw=torch.tensor(np.concatenate(self.grids)),
            mm_token_type_ids=torch.tensor(of_images).int(),
        )

    def positions(self, token_ids, padding_mask):
        """Where tokens stand, `(B, 4, T)`, as keras_hub's preprocessor says."""
        inputs = self.inputs(token_ids, padding_mask)
        found, _ = self.model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        found = found.numpy().swapaxes(0, 1)
        return np.concatenate([found[:, :1], found], axis=1)

    def logits(self, token_ids, padding_mask):
        with torch.no_grad():
            inputs = self.inputs(token_ids, padding_mask)
            return self.model(**inputs).logits.numpy()

    def greedy(self, token_ids):
        """What transformers continues the prompts by."""
        return self.model.generate(
            **self.inputs(token_ids, np.ones_like(token_ids)),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()[:, token_ids.shape[1] :]


def _t5_arguments(config):
    return dict(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_dim=config.d_model,
        intermediate_dim=config.d_ff,
        key_value_dim=config.d_kv,
        dropout=0.0,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def _t5_weights(backbone, read):
    yield backbone.token_embedding.embeddings, read("shared.weight")
    for side in ("encoder", "decoder"):
        norm = getattr(backbone, f"{side}_layer_norm")
        yield norm.weight, read(f"{side}.final_layer_norm.weight")
        blocks = getattr(backbone, f"{side}_transformer_layers")
        for i, block in enumerate(blocks):
            name = f"{side}.block.{i}.layer"
            branches = [("SelfAttention", "self_attention")]
            if side == "decoder":
                branches.append(("EncDecAttention", "cross_attention"))
            for j, (theirs, ours) in enumerate(branches):
                attention = getattr(block, ours)
                for part in ("query", "key", "value", "output"):
                    letter = "o" if part == "output" else part[0]
                    yield from _linear(
                        getattr(attention, f"{part}_projector"),
                        read,
                        f"{name}.{j}.{theirs}.{letter}",
                    )
                if attention.use_relative_attention_bias:
                    bias = f"{name}.{j}.{theirs}.relative_attention_bias"
                    yield (
                        attention.relative_attention_bias,
                        read(f"{bias}.weight"),
                    )
                norm = getattr(block, f"{ours}_layer_norm")
                yield norm.weight, read(f"{name}.{j}.layer_norm.weight")
            last = f"{name}.{len(branches)}"
            yield block.layer_norm.weight, read(f"{last}.layer_norm.weight")
            for layer, part in (
                (block.input_projector, "wi_0"),
                (block.gate_projector, "wi_1"),
                (block.output_projector, "wo"),
            ):
                yield from _linear(layer, read, f"{last}.DenseReluDense.{part}")


def _t5gemma2_arguments(config):
    sides = config.encoder.text_config, config.decoder
    arguments = {}
    for name, side in zip(("encoder", "decoder"), sides):
        arguments |= {
            f"{name}_hidden_dim": side.hidden_size,
            f"{name}_intermediate_dim": side.intermediate_size,
            f"{name}_num_layers": side.num_hidden_layers,
            f"{name}_num_attention_heads": side.num_attention_heads,
            f"{name}_num_key_value_heads": side.num_key_value_heads,
            f"{name}_head_dim": side.head_dim,
            f"{name}_layer_types": side.layer_types,
        }
    decoder = config.decoder
    rope = decoder.rope_parameters
    return dict(
        arguments,
        vocabulary_size=decoder.vocab_size,
        rms_norm_eps=decoder.rms_norm_eps,
        query_pre_attn_scalar=decoder.query_pre_attn_scalar,
        sliding_window=decoder.sliding_window,
        attn_logit_softcapping=decoder.attn_logit_softcapping,
        final_logit_softcapping=decoder.final_logit_softcapping,
        rope_max_wavelength=rope["sliding_attention"]["rope_theta"],
        global_rope_scaling_factor=rope["full_attention"]["factor"],
    )


def _t5gemma2_weights(backbone, read):
    # keras_hub's converter reads names that transformers 5 does not write.
    embeddings = read("model.encoder.text_model.embed_tokens.weight")
    yield backbone.token_embedding.embeddings, embeddings
    yield backbone.decoder_token_embedding.embeddings, embeddings
    sides = (
        ("encoder", "encoder.text_model", "self_attn"),
        ("decoder", "decoder", "merged_attn"),
    )
    for side, theirs, attention_name in sides:
        norm = getattr(backbone, f"{side}_norm")
        yield norm.scale, read(f"model.{theirs}.norm.weight")
        for i, block in enumerate(getattr(backbone, f"{side}_layers")):
            name = f"model.{theirs}.layers.{i}"
            attention = getattr(block, attention_name)
            for layer, part in (
                (attention.query_dense, "self_attn.q_proj"),
                (attention.key_dense, "self_attn.k_proj"),
                (attention.value_dense, "self_attn.v_proj"),
                (attention.output_dense, "self_attn.o_proj"),
                (block.mlp.gate_proj, "mlp.gate_proj"),
                (block.mlp.up_proj, "mlp.up_proj"),
                (block.mlp.down_proj, "mlp.down_proj"),
            ):
                yield from _linear(layer, read, f"{name}.{part}")
            for layer, part in (
                (attention.query_norm, "self_attn.q_norm"),
                (attention.key_norm, "self_attn.k_norm"),
                (block.pre_self_attn_layernorm, "pre_self_attn_layernorm"),
                (block.post_self_attn_layernorm, "post_self_attn_layernorm"),
                (block.pre_feedforward_layernorm, "pre_feedforward_layernorm"),
                (
                    block.post_feedforward_layernorm,
                    "post_feedforward_layernorm",
                ),
            ):
                yield layer.scale, read(f"{name}.{part}.weight")


def _gemma3n_arguments(config):
    rope = config.rope_parameters
    names = (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "layer_types",
        "sliding_window",
        "max_position_embeddings",
        "vocab_size_per_layer_input",
        "hidden_size_per_layer_input",
        "altup_num_inputs",
        "laurel_rank",
        "activation_sparsity_pattern",
        "altup_coef_clip",
        "altup_active_idx",
        "num_kv_shared_layers",
        "rms_norm_eps",
    )
    return dict(
        {name: getattr(config, name) for name in names},
        text_vocab_size=config.vocab_size,
        text_hidden_size=config.hidden_size,
        pad_token_id=0,
        hidden_activation="gelu_approximate",
        rope_theta=rope["full_attention"]["rope_theta"],
        rope_local_base_freq=rope["sliding_attention"]["rope_theta"],
        final_logit_soft_cap=config.final_logit_softcapping,
    )


def _gemma3n_with_towers(config):
    # Of images, one for four tokens.
    tower = dict(
        **convert_arch_def_to_stackwise([["er_r1_k3_s2_e1_c8"]] * 2),
        stem_size=8,
        num_features=8,
        image_shape=(16, 16, 3),
        use_msfa=False,
    )
    vision, audio = config.vision_config, config.audio_config
    names = {
        "num_hidden_layers": "conf_num_hidden_layers",
        "residual_weight": "conf_residual_weight",
        "num_attention_heads": "conf_num_attention_heads",
        "attention_chunk_size": "conf_attention_chunk_size",
        "num_attention_context_right": "conf_attention_context_right",
        "num_attention_context_left": "conf_attention_context_left",
        "attention_logit_cap": "conf_attention_logit_cap",
        "conv_kernel_size": "conf_conv_kernel_size",
        "reduction_factor": "conf_reduction_factor",
    }
    as_there = (
        "hidden_size",
        "input_feat_size",
        "sscp_conv_channel_size",
        "sscp_conv_kernel_size",
        "sscp_conv_stride_size",
        "sscp_conv_group_norm_eps",
        "rms_norm_eps",
        "gradient_clipping",
    )
    names |= {name: name for name in as_there}
    return dict(
        _gemma3n_arguments(config.text_config),
        vision_encoder_config=tower,
        vision_hidden_size=vision.hidden_size,
        vision_vocab_size=vision.vocab_size,
        vision_vocab_offset=vision.vocab_offset,
        image_token_id=config.image_token_id,
        audio_encoder_config={k: getattr(audio, x) for k, x in names.items()},
        audio_hidden_size=audio.hidden_size,
        audio_vocab_size=audio.vocab_size,
        audio_vocab_offset=audio.vocab_offset,
    )


def _gemma3n_weights(backbone, read):
    # keras_hub's converter reads models of text together with two towers.
    found = []

    class Loader:
        """What it asks for weights."""

        def port_weight(self, variable, name, hook_fn=lambda x, shape: x):
            if backbone.vision_encoder is None:
                name = name.replace("model.language_model.", "model.")
            try:
                value = hook_fn(read(name), variable.shape)
            except KeyError:
                # Which nothing reads, and transformers has not.
                assert any(x in name for x in ("k_proj", "v_proj", "k_norm"))
                value = variable.numpy()
            found.append((variable, value))

    convert_gemma3n._port_language_model(Loader(), backbone)
    if backbone.vision_encoder is not None:
        convert_gemma3n._port_audio_tower(Loader(), backbone)
        convert_gemma3n._port_multimodal_embedders(Loader(), backbone)
        # Both have this one.
        rng = np.random.default_rng(0)
        for weight in backbone.vision_encoder.weights:
            value = 0.3 * rng.normal(size=weight.shape)
            found.append((weight, value + (weight.name == "gamma")))
    return found


def _moonshine_arguments(config):
    rope = config.rope_parameters
    return dict(
        vocabulary_size=config.vocab_size,
        filter_dim=config.hidden_size,
        encoder_num_layers=config.encoder_num_hidden_layers,
        decoder_num_layers=config.decoder_num_hidden_layers,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        encoder_num_heads=config.encoder_num_attention_heads,
        decoder_num_heads=config.decoder_num_attention_heads,
        feedforward_expansion_factor=(
            config.intermediate_size // config.hidden_size
        ),
        partial_rotary_factor=rope["partial_rotary_factor"],
        rope_theta=rope["rope_theta"],
    )


def _moonshine_weights(backbone, read):
    for rotary in ("encoder_rotary_embedding", "decoder_rotary_embedding"):
        frequencies = getattr(backbone, rotary).inv_freq
        yield frequencies, keras.ops.convert_to_numpy(frequencies)
    yield (
        backbone.token_embedding.embeddings,
        read("model.decoder.embed_tokens.weight"),
    )
    for name in ("conv1", "conv2", "conv3"):
        layer, theirs = getattr(backbone, name), f"model.encoder.{name}"
        yield layer.kernel, read(f"{theirs}.weight").transpose(2, 1, 0)
        if layer.use_bias:
            yield layer.bias, read(f"{theirs}.bias")
    yield from _norm(backbone.group_norm, read, "model.encoder.groupnorm")
    encoder, decoder = "model.encoder", "model.decoder"
    norm = backbone.encoder_final_layer_norm
    yield norm.gamma, read(f"{encoder}.layer_norm.weight")
    yield backbone.decoder_post_norm.gamma, read(f"{decoder}.norm.weight")
    for i, block in enumerate(backbone.encoder_blocks):
        name = f"{encoder}.layers.{i}"
        yield from _of_moonshine(
            read,
            name,
            {"self_attn": block.self_attention_layer},
            {
                "input_layernorm": block.self_attention_layer_norm,
                "post_attention_layernorm": block.feedforward_layer_norm,
            },
            block.feedforward,
        )
    for i, block in enumerate(backbone.decoder_blocks):
        name = f"{decoder}.layers.{i}"
        yield from _of_moonshine(
            read,
            name,
            {
                "self_attn": block.self_attention,
                "encoder_attn": block.cross_attention,
            },
            {
                "input_layernorm": block.norm1,
                "post_attention_layernorm": block.norm2,
                "final_layernorm": block.norm3,
            },
            block.ff,
        )


def _of_moonshine(read, name, attentions, norms, feedforward):
    for theirs, attention in attentions.items():
        for layer, part in (
            (attention._query_dense, "q_proj"),
            (attention._key_dense, "k_proj"),
            (attention._value_dense, "v_proj"),
            (attention._output_dense, "o_proj"),
        ):
            yield from _linear(layer, read, f"{name}.{theirs}.{part}")
    for theirs, norm in norms.items():
        yield norm.gamma, read(f"{name}.{theirs}.weight")
    yield from _linear(feedforward.dense_1, read, f"{name}.mlp.fc1")
    yield from _linear(feedforward.dense_2, read, f"{name}.mlp.fc2")


# Families without a converter. A linear layer of transformers has its outputs
# first, those of keras_hub last, some of them in two dimensions.


def _linear(layer, read, name):
    yield layer.kernel, read(f"{name}.weight").T
    if layer.bias is not None:
        yield layer.bias, read(f"{name}.bias")


def _norm(layer, read, name):
    yield layer.gamma, read(f"{name}.weight")
    yield layer.beta, read(f"{name}.bias")


def _fused(layers, read, name):
    """Query, key and value for each head, in one matrix."""
    heads, size = layers[0].bias.shape
    kernel = read(f"{name}.weight").reshape(heads, 3, size, -1)
    bias = read(f"{name}.bias").reshape(heads, 3, size)
    for i, layer in enumerate(layers):
        yield layer.kernel, np.moveaxis(kernel[:, i], -1, 0)
        yield layer.bias, bias[:, i]


def _opt_arguments(config):
    return dict(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.ffn_dim,
        max_sequence_length=config.max_position_embeddings,
        dropout=0.0,
    )


def _opt_weights(backbone, read):
    embeddings = backbone.embeddings
    yield (
        embeddings.token_embedding.embeddings,
        read("model.decoder.embed_tokens.weight"),
    )
    yield (
        embeddings.position_embedding.position_embeddings,
        # Two rows are for what is padded.
        read("model.decoder.embed_positions.weight")[2:],
    )
    for i, block in enumerate(backbone.transformer_layers):
        name = f"model.decoder.layers.{i}"
        attention = block._self_attention_layer
        for layer, part in (
            (attention.query_dense, "self_attn.q_proj"),
            (attention.key_dense, "self_attn.k_proj"),
            (attention.value_dense, "self_attn.v_proj"),
            (attention.output_dense, "self_attn.out_proj"),
            (block._feedforward_intermediate_dense, "fc1"),
            (block._feedforward_output_dense, "fc2"),
        ):
            yield from _linear(layer, read, f"{name}.{part}")
        for layer, part in (
            (block._self_attention_layer_norm, "self_attn_layer_norm"),
            (block._feedforward_layer_norm, "final_layer_norm"),
        ):
            yield from _norm(layer, read, f"{name}.{part}")
    yield from _norm(
        backbone.layer_norm, read, "model.decoder.final_layer_norm"
    )


def _bloom_arguments(config):
    return dict(
        vocabulary_size=config.vocab_size,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        hidden_dim=config.hidden_size,
        intermediate_dim=4 * config.hidden_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def _bloom_weights(backbone, read):
    name = "transformer"
    yield (
        backbone.token_embedding.embeddings,
        read(f"{name}.word_embeddings.weight"),
    )
    yield from _norm(
        backbone.embeddings_layer_norm,
        read,
        f"{name}.word_embeddings_layernorm",
    )
    for i, block in enumerate(backbone.transformer_layers):
        part = f"{name}.h.{i}"
        attention = block._self_attention_layer
        yield from _fused(
            (
                attention._query_dense,
                attention._key_dense,
                attention._value_dense,
            ),
            read,
            f"{part}.self_attention.query_key_value",
        )
        yield from _linear(
            attention._output_dense, read, f"{part}.self_attention.dense"
        )
        yield from _linear(
            block._mlp_intermediate_dense, read, f"{part}.mlp.dense_h_to_4h"
        )
        yield from _linear(
            block._mlp_output_dense, read, f"{part}.mlp.dense_4h_to_h"
        )
        yield from _norm(
            block._pre_attention_layernorm, read, f"{part}.input_layernorm"
        )
        yield from _norm(
            block._post_attention_layernorm,
            read,
            f"{part}.post_attention_layernorm",
        )
    yield from _norm(backbone.layer_norm, read, f"{name}.ln_f")


def _falcon_arguments(config):
    return dict(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.ffn_hidden_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
    )


def _falcon_weights(backbone, read):
    name = "transformer"
    yield (
        backbone.token_embedding.embeddings,
        read(f"{name}.word_embeddings.weight"),
    )
    for i, block in enumerate(backbone.transformer_layers):
        part = f"{name}.h.{i}"
        attention = block.attention_layer
        yield from _fused(
            (attention.query_dense, attention.key_dense, attention.value_dense),
            read,
            f"{part}.self_attention.query_key_value",
        )
        yield from _linear(
            attention.output_dense, read, f"{part}.self_attention.dense"
        )
        yield from _linear(
            block.dense_h_to_4h, read, f"{part}.mlp.dense_h_to_4h"
        )
        yield from _linear(
            block.dense_4h_to_h, read, f"{part}.mlp.dense_4h_to_h"
        )
        yield from _norm(block.input_layernorm, read, f"{part}.input_layernorm")
        yield from _norm(
            block.post_attention_layernorm,
            read,
            f"{part}.post_attention_layernorm",
        )
    yield from _norm(backbone.final_layernorm, read, f"{name}.ln_f")


def _gpt_neo_x_arguments(config):
    rope = config.rope_parameters
    return dict(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        rotary_percentage=rope["partial_rotary_factor"],
        rotary_max_wavelength=rope["rope_theta"],
        layer_norm_epsilon=config.layer_norm_eps,
        max_sequence_length=config.max_position_embeddings,
    )


def _gpt_neo_x_weights(backbone, read):
    embedding = backbone.token_embedding
    yield embedding.embeddings, read("gpt_neox.embed_in.weight")
    if not embedding.tie_weights:
        yield embedding.reverse_embeddings, read("lm_head.weight").T
    for i, block in enumerate(backbone.transformer_layers):
        name = f"gpt_neox.layers.{i}"
        attention = block._self_attention_layer
        for layer, part in (
            (attention._qkv_dense, "attention.query_key_value"),
            (attention._output_dense, "attention.dense"),
            (block._feedforward_intermediate_dense, "mlp.dense_h_to_4h"),
            (block._feedforward_output_dense, "mlp.dense_4h_to_h"),
        ):
            yield from _linear(layer, read, f"{name}.{part}")
        for layer, part in (
            (block._self_attention_layer_norm, "input_layernorm"),
            (block._feedforward_layer_norm, "post_attention_layernorm"),
        ):
            yield from _norm(layer, read, f"{name}.{part}")
    yield from _norm(backbone.layer_norm, read, "gpt_neox.final_layer_norm")


def _phi3_arguments(config):
    rope = config.rope_parameters
    scaled = rope["rope_type"] != "default"
    return dict(
        vocabulary_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        num_query_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        layer_norm_epsilon=config.rms_norm_eps,
        max_sequence_length=config.max_position_embeddings,
        pretraining_sequence_length=config.original_max_position_embeddings,
        rope_max_wavelength=rope["rope_theta"],
        rope_scaling_type="su" if scaled else None,
        rope_scaling_short_factor=rope.get("short_factor"),
        rope_scaling_long_factor=rope.get("long_factor"),
    )


def _phi3_weights(backbone, read):
    yield (
        backbone.token_embedding.embeddings,
        read("model.embed_tokens.weight"),
    )
    yield (
        backbone.token_embedding.reverse_embeddings,
        read("lm_head.weight").T,
    )
    for i, block in enumerate(backbone.transformer_layers):
        name = f"model.layers.{i}"
        attention = block.attention
        layers = attention.query_dense, attention.key_dense
        layers += (attention.value_dense,)
        sizes = [int(np.prod(x.kernel.shape[1:])) for x in layers]
        kernels = np.split(
            read(f"{name}.self_attn.qkv_proj.weight"), np.cumsum(sizes[:2])
        )
        for layer, kernel in zip(layers, kernels, strict=True):
            yield layer.kernel, kernel.T
        gate, up = np.split(read(f"{name}.mlp.gate_up_proj.weight"), 2)
        yield block.feedforward_gate_dense.kernel, gate.T
        yield block.feedforward_intermediate_dense.kernel, up.T
        yield from _linear(
            attention.output_dense, read, f"{name}.self_attn.o_proj"
        )
        yield from _linear(
            block.feedforward_output_dense, read, f"{name}.mlp.down_proj"
        )
        for norm in ("pre_attention_layernorm", "post_attention_layernorm"):
            theirs = norm.replace("pre_attention", "input")
            yield getattr(block, norm).scale, read(f"{name}.{theirs}.weight")
    yield backbone.layer_norm.scale, read("model.norm.weight")


_COMMON = dict(
    vocab_size=100,
    attn_implementation="eager",
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_LLAMA = dict(
    _COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    # Larger than what is built in anywhere.
    rms_norm_eps=1e-3,
)
_HEADS = dict(_LLAMA, head_dim=16)
# Upstream has no other epsilon for these.
_GEMMA = dict(_HEADS, rms_norm_eps=1e-6)
_GEMMA4 = dict(
    _HEADS,
    global_head_dim=24,
    sliding_window=WINDOW,
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=1000.0),
        full_attention=dict(
            rope_type="proportional",
            rope_theta=100000.0,
            partial_rotary_factor=0.5,
        ),
    ),
)
_ROPE = dict(rope_type="default", rope_theta=1000.0)
_LINEAR = dict(rope_type="linear", rope_theta=1000.0, factor=4.0)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_WINDOW = dict(use_sliding_window=True, sliding_window=WINDOW)


def _llama3():
    return transformers.LlamaConfig(
        **_LLAMA,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    )


def _phi3(original_max_position_embeddings):
    """Whose positions are scaled otherwise from that length on."""
    return Family(
        "Phi3",
        transformers.Phi3Config(
            **_LLAMA,
            original_max_position_embeddings=original_max_position_embeddings,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1000.0,
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[1.5, 2.0, 3.0, 5.0],
            ),
        ),
        _phi3_arguments,
        _phi3_weights,
    )


def _gemma2(query_pre_attn_scalar):
    return Family(
        "Gemma",
        transformers.Gemma2Config(
            **_GEMMA,
            query_pre_attn_scalar=query_pre_attn_scalar,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
        ),
    )


_QWEN3_5 = dict(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    # Large: what heads return may be small, and its norm enlarges what rounding
    # leaves. With 1e-3, transformers is 2.5e-4 away from its own float64.
    rms_norm_eps=1e-2,
    tie_word_embeddings=False,
    rope_parameters=dict(
        rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.5
    ),
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_QWEN3_5_MOE = dict(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
)
FAMILIES = {
    "gpt2": Family(
        "GPT2",
        transformers.GPT2Config(
            **_COMMON,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            n_inner=48,
        ),
    ),
    "opt": Family(
        "OPT",
        transformers.OPTConfig(
            **_COMMON,
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        _opt_arguments,
        _opt_weights,
    ),
    "bloom": Family(
        "Bloom",
        transformers.BloomConfig(
            **_COMMON,
            hidden_size=48,
            n_layer=2,
            # Slopes are another formula for what is not a power of two.
            n_head=6,
            layer_norm_epsilon=1e-3,
        ),
        _bloom_arguments,
        _bloom_weights,
    ),
    "falcon": Family(
        "Falcon",
        transformers.FalconConfig(
            # Its eager attention adds the slopes twice.
            **dict(_COMMON, attn_implementation="sdpa"),
            hidden_size=48,
            num_hidden_layers=2,
            # Of 12 heads or more, it rounds the slopes to bfloat16.
            num_attention_heads=6,
            ffn_hidden_size=40,
            layer_norm_epsilon=1e-3,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
        _falcon_arguments,
        _falcon_weights,
    ),
    "gpt_neo_x": Family(
        "GPTNeoX",
        transformers.GPTNeoXConfig(
            **_COMMON,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            layer_norm_eps=1e-3,
            rope_parameters=dict(_ROPE, partial_rotary_factor=0.5),
            # All that keras_hub knows.
            hidden_act="gelu_fast",
            tie_word_embeddings=True,
        ),
        _gpt_neo_x_arguments,
        _gpt_neo_x_weights,
    ),
    "llama": Family(
        "Llama3",
        transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    ),
    "llama3": Family("Llama3", _llama3()),
    "mistral": Family(
        "Mistral",
        transformers.MistralConfig(
            **_HEADS, sliding_window=WINDOW, rope_parameters=_LINEAR
        ),
    ),
    "mixtral": Family(
        "Mixtral",
        transformers.MixtralConfig(
            **_LLAMA,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=_LINEAR,
        ),
    ),
    "qwen": Family(
        "Qwen",
        transformers.Qwen2Config(
            **_LLAMA, **_WINDOW, max_window_layers=0, rope_parameters=_LINEAR
        ),
    ),
    "qwen_moe": Family(
        "QwenMoe",
        transformers.Qwen2MoeConfig(
            **_LLAMA,
            **_MOE,
            **_WINDOW,
            layer_types=["sliding_attention"] * 2,
            shared_expert_intermediate_size=40,
            rope_parameters=_LINEAR,
        ),
    ),
    "qwen3": Family(
        "Qwen3",
        transformers.Qwen3Config(
            **_HEADS, **_WINDOW, max_window_layers=0, rope_parameters=_LINEAR
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        transformers.Qwen3MoeConfig(
            **_HEADS,
            **_MOE,
            **_WINDOW,
            norm_topk_prob=True,
            rope_parameters=_LINEAR,
        ),
    ),
    "qwen3_5": OfSeveralMedia(
        "Qwen3_5",
        transformers.Qwen3_5TextConfig(**_QWEN3_5, intermediate_size=48),
    ),
    "qwen3_5_moe": OfSeveralMedia(
        "Qwen3_5Moe",
        transformers.Qwen3_5MoeTextConfig(**_QWEN3_5, **_QWEN3_5_MOE),
    ),
    "phi3": _phi3(MAX_LENGTH),
    "phi3_long": _phi3(PROMPT_LENGTH - 4),
    "gemma": Family("Gemma", transformers.GemmaConfig(**_GEMMA)),
    "gemma2": _gemma2(16),
    # The largest one divides by the root of the hidden size for each head.
    "gemma2_27b": _gemma2(8),
    "gemma3": Family(
        "Gemma3",
        transformers.Gemma3TextConfig(
            # The sixth layer is the first without a window.
            **dict(_GEMMA, num_hidden_layers=6),
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
                full_attention=dict(
                    rope_type="linear", factor=8.0, rope_theta=1000000.0
                ),
            ),
        ),
    ),
    "gemma4": Family(
        "Gemma4",
        transformers.Gemma4TextConfig(
            **dict(_GEMMA4, num_hidden_layers=4),
            # The last two read the keys and values of the first two.
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=6,
            vocab_size_per_layer_input=100,
            final_logit_softcapping=10.0,
        ),
    ),
    "gemma4_moe": Family(
        "Gemma4",
        transformers.Gemma4TextConfig(
            **_GEMMA4,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=0,
            # Keys are values where all of a text is seen.
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=24,
        ),
    ),
    "gemma3n": Family(
        "Gemma3n",
        transformers.Gemma3nTextConfig(
            **dict(_GEMMA, num_hidden_layers=6),
            layer_types=["sliding_attention", "full_attention"] * 3,
            num_kv_shared_layers=3,
            sliding_window=WINDOW,
            vocab_size_per_layer_input=100,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            activation_sparsity_pattern=[0.5, 0.0] * 3,
            final_logit_softcapping=10.0,
        ),
        _gemma3n_arguments,
        _gemma3n_weights,
    ),
    "gpt_oss": Family(
        "GptOss",
        transformers.GptOssConfig(
            **dict(_HEADS, intermediate_size=32),
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=150000.0,
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=4096,
            ),
        ),
    ),
    "smollm3": Family(
        "SmolLM3",
        transformers.SmolLM3Config(
            # The fourth layer is the first that does not rotate.
            **dict(_LLAMA, num_hidden_layers=4),
            rope_parameters=_ROPE,
        ),
    ),
}

_VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    vision_use_head=False,
    model_type="siglip_vision_model",
)
IMAGE_MODELS = {
    "pali_gemma": ImageText(
        "PaliGemma",
        transformers.PaliGemmaConfig(
            text_config=dict(
                # keras_hub has no embedding of the token for images.
                dict(_GEMMA, vocab_size=101),
                model_type="gemma",
            ),
            vision_config=dict(_VISION, projection_dim=32),
            image_token_id=100,
            projection_dim=32,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        ),
    ),
    "gemma3": ImagesInText(
        "Gemma3",
        transformers.Gemma3Config(
            text_config=dict(
                dict(_GEMMA, vocab_size=101),
                num_hidden_layers=6,
                query_pre_attn_scalar=16,
                sliding_window=WINDOW,
            ),
            # Of 64 patches, four tokens.
            vision_config=dict(_VISION, patch_size=2),
            mm_tokens_per_image=4,
            image_token_id=100,
            boi_token_id=None,
            eoi_token_id=None,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        ),
    ),
}

_BLIP2 = dict(
    vision_config=dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    ),
    qformer_config=dict(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=16,
        initializer_range=0.2,
    ),
    num_query_tokens=4,
    image_token_index=100,
    attn_implementation="eager",
)
IMAGE_MODELS["blip2"] = WithQFormer(
    "BLIP2",
    transformers.Blip2Config(
        **_BLIP2,
        text_config=dict(
            _COMMON,
            model_type="opt",
            vocab_size=101,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
    ),
)
IMAGE_MODELS["gemma4"] = PatchesInText(
    "Gemma4",
    transformers.Gemma4Config(
        text_config=dict(
            _GEMMA4,
            vocab_size=101,
            num_hidden_layers=4,
            # The last two read the keys and values of the first two.
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=6,
            vocab_size_per_layer_input=101,
            use_bidirectional_attention="vision",
            pad_token_id=0,
        ),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=8,
            use_clipped_linears=True,
            standardize=True,
        ),
        audio_config=dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            subsampling_conv_channels=[128, 2],
            attention_chunk_size=2,
            attention_context_left=2,
            output_proj_dims=12,
        ),
        image_token_id=100,
        audio_token_id=101,
        boa_token_id=None,
        eoa_token_index=None,
        boi_token_id=None,
        eoi_token_id=None,
        attn_implementation="eager",
    ),
)
IMAGE_MODELS["gemma3n"] = ImagesByToken(
    "Gemma3n",
    transformers.Gemma3nConfig(
        text_config=dict(
            dict(_GEMMA, vocab_size=108),
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            sliding_window=WINDOW,
            vocab_size_per_layer_input=100,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            activation_sparsity_pattern=[0.5, 0.0] * 2,
            final_logit_softcapping=10.0,
            pad_token_id=0,
        ),
        vision_config=transformers.Gemma3nVisionConfig(
            hidden_size=8, vocab_offset=100, vocab_size=4
        ),
        audio_config=dict(
            hidden_size=8,
            vocab_offset=104,
            vocab_size=4,
            input_feat_size=8,
            conf_num_hidden_layers=1,
            conf_num_attention_heads=1,
            conf_reduction_factor=1,
            sscp_conv_channel_size=(4, 4),
        ),
        vision_soft_tokens_per_image=4,
        image_token_id=101,
        boi_token_id=None,
        eoi_token_id=None,
        attn_implementation="eager",
    ),
    _gemma3n_with_towers,
    _gemma3n_weights,
)
_IN_GRIDS = dict(
    text_config=dict(
        {
            **_QWEN3_5,
            # With one for the token that stands for an image.
            "vocab_size": 101,
            # What a layer with a state makes of rounding, another enlarges.
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        head_dim=16,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1000.0,
            partial_rotary_factor=0.75,
            mrope_section=[2, 2, 2],
        ),
    ),
    vision_config=dict(
        depth=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=24,
        in_channels=3,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=32,
        num_position_embeddings=16,
    ),
    image_token_id=100,
    tie_word_embeddings=False,
    attn_implementation="eager",
)
GRID_MODELS = {
    "qwen3_5": ImagesInGrids(
        "Qwen3_5",
        transformers.Qwen3_5Config(
            **{
                **_IN_GRIDS,
                "text_config": dict(
                    _IN_GRIDS["text_config"], intermediate_size=48
                ),
            }
        ),
    ),
    "qwen3_5_moe": ImagesInGrids(
        "Qwen3_5Moe",
        transformers.Qwen3_5MoeConfig(
            **{
                **_IN_GRIDS,
                "text_config": dict(_IN_GRIDS["text_config"], **_QWEN3_5_MOE),
            }
        ),
    ),
}

_T5GEMMA = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    query_pre_attn_scalar=12,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=10.0,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_T5GEMMA2 = dict(
    # What it has no use for there.
    {k: x for k, x in _T5GEMMA.items() if k != "attn_logit_softcapping"},
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=10000.0),
        full_attention=dict(
            rope_type="linear", factor=8.0, rope_theta=1000000.0
        ),
    ),
)
ENCODER_DECODERS = {
    "bart": EncoderDecoder(
        "Bart",
        transformers.BartConfig(
            **dict(_COMMON, pad_token_id=1),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
    ),
    "t5": EncoderDecoder(
        "T5",
        transformers.T5Config(
            **dict(_COMMON, pad_token_id=0),
            d_model=32,
            d_kv=12,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-relu",
            layer_norm_epsilon=1e-3,
            decoder_start_token_id=2,
        ),
        _t5_arguments,
        _t5_weights,
    ),
    "t5gemma": EncoderDecoder(
        "T5Gemma",
        transformers.T5GemmaConfig(
            encoder=_T5GEMMA,
            decoder=dict(_T5GEMMA, hidden_size=40),
            vocab_size=100,
            attn_implementation="eager",
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=None,
        ),
    ),
    "t5gemma2": EncoderDecoder(
        "T5Gemma2",
        transformers.T5Gemma2Config(
            encoder=dict(
                text_config=_T5GEMMA2,
                # It has one, whatever it is to read.
                vision_config=dict(
                    model_type="siglip_vision_model",
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    image_size=8,
                    patch_size=4,
                ),
                mm_tokens_per_image=1,
            ),
            decoder=_T5GEMMA2,
            vocab_size=100,
            attn_implementation="eager",
            eoi_token_index=101,
            image_token_index=102,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=None,
        ),
        _t5gemma2_arguments,
        _t5gemma2_weights,
    ),
    "blip2_t5": ImagesBeforeSource(
        "BLIP2",
        transformers.Blip2Config(
            **_BLIP2,
            text_config=dict(
                _COMMON,
                model_type="t5",
                pad_token_id=0,
                vocab_size=101,
                d_model=32,
                d_kv=12,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                layer_norm_epsilon=1e-3,
                tie_word_embeddings=False,
                decoder_start_token_id=0,
            ),
        ),
    ),
    "moonshine": FromSound(
        "Moonshine",
        transformers.MoonshineConfig(
            **dict(_COMMON, pad_token_id=0),
            hidden_size=32,
            intermediate_size=64,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            decoder_start_token_id=2,
            rope_parameters=dict(_ROPE, partial_rotary_factor=0.5),
        ),
        _moonshine_arguments,
        _moonshine_weights,
    ),
}
