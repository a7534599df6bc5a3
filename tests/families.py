"""The model families that tests run over, as small random models.

What defines a family is tested on every one of them, what the core does for
all of them on the few that differ most: see `every_family`, `deep_families` and
`in_turn` below, and "Tests" in CONTRIBUTING.md.
"""

import dataclasses
import functools
import typing
import zlib

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras.src.saving import object_registration
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import (
    convert_arch_def_to_stackwise,
)
from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import (
    Qwen3_5VisionEncoder,
)

from tests import text
from tests.subject import PATCHED

if PATCHED:
    from keras_hub import models
else:
    from keras_nlp_cache import models

# Arguments of `compile()` for tests of compiled loops; see `conftest.py`.
XLA = {"jit_compile": True} if keras.config.backend() == "tensorflow" else {}
VOCABULARY_SIZE = 100


def random_tokens(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, VOCABULARY_SIZE, (batch, length)).astype("int32")


def padding_mask(lengths, total):
    """1 for the first `lengths[i]` of `total` positions of row `i`."""
    return (np.arange(total) < np.array(lengths)[:, None]).astype("int32")


# What encoders read, seven tokens and five, and as long for one of sound.
SOURCE = {
    "encoder_token_ids": random_tokens(2, 7, seed=1),
    "encoder_padding_mask": padding_mask([7, 5], 7),
}
_SAMPLES = 3199
SOUND = {
    "encoder_input_values": np.random.default_rng(1)
    .normal(size=(2, _SAMPLES, 1))
    .astype("float32"),
    "encoder_padding_mask": padding_mask([_SAMPLES, _SAMPLES - 768], _SAMPLES),
}
# What towers see.
IMAGES = np.random.default_rng(3).uniform(size=(2, 16, 16, 3))
IMAGES = IMAGES.astype("float32")
SOURCE_AND_IMAGES = {**SOURCE, "images": IMAGES}

_LLAMA = dict(
    vocabulary_size=VOCABULARY_SIZE,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=32,
    intermediate_dim=48,
)
_GEMMA = dict(_LLAMA, head_dim=8, intermediate_dim=96)
_HEADS = dict(
    vocabulary_size=VOCABULARY_SIZE,
    num_layers=2,
    num_heads=4,
    hidden_dim=32,
    intermediate_dim=48,
)
_GPT2 = dict(_HEADS, max_sequence_length=64, dropout=0.0)
_FALCON = {k: v for k, v in _HEADS.items() if k != "num_heads"}
_FALCON["num_attention_heads"] = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One model family, with the arguments of a small model.

    Attributes:
        name: Shown in the names of tests.
        prefix: What the names of its classes begin with.
        config: Arguments of its backbone, as a tuple of items.
        kind: What the names of its tasks end with.
    """

    name: str
    prefix: str
    config: tuple
    kind: typing.ClassVar[str] = "CausalLM"
    # Whether some layers keep a state in place of keys and values.
    keeps_states: typing.ClassVar[bool] = False
    # How far apart it is what its cache and all of a text at once come to.
    tolerance: typing.ClassVar[float] = 1e-5

    @property
    def decodes_wrong(self):
        """Whether upstream's steps are not what its own forward pass says.

        It rotates the query of each step as that of the first position. Or it
        has a state run on over padding, and reads the last token twice.
        """
        return self.prefix == "GPTNeoX" or self.keeps_states

    @property
    def measures_distance(self):
        """Whether it matters how far apart in the text tokens stand.

        Beside what rotated positions say: windows and linear biases count the
        positions between a token and those of earlier calls.
        """
        has_window = any(
            name.startswith("sliding_w") for name, _ in self.config
        )
        return has_window or self.prefix in ("Bloom", "Falcon")

    def ours(self, kind):
        return getattr(models, self.prefix + kind)

    def upstream(self, kind):
        return getattr(keras_hub.models, self.prefix + kind)

    def task(self, backbone, preprocessor=None, **kwargs):
        """One of our tasks. Upstream does not order arguments in all alike."""
        cls = self.ours(self.kind)
        return cls(backbone=backbone, preprocessor=preprocessor, **kwargs)

    def upstream_task(self, backbone, preprocessor=None):
        cls = self.upstream(self.kind)
        return cls(backbone=backbone, preprocessor=preprocessor)

    def as_trained(self, model):
        """A backbone of upstream's, with what ours puts right in its layers."""
        return model

    def inputs(self, token_ids, padding_mask):
        """What a backbone is called with to read a text."""
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def arguments(self, **kwargs):
        """Arguments of its backbone, some of them others than in `config`."""
        return dict(self.config, **kwargs)

    def backbone(self, **kwargs):
        """One of our backbones, with weights that make attention matter."""
        backbone = self.ours("Backbone")(**self.arguments(**kwargs))
        randomize(backbone)
        return backbone

    def upstream_backbone(self, like, **kwargs):
        """The upstream backbone with the weights of one of ours."""
        kwargs.setdefault("dtype", like.dtype_policy)
        backbone = self.upstream("Backbone")(**self.arguments(**kwargs))
        backbone.set_weights(like.get_weights())
        return backbone

    @functools.cached_property
    def pair(self):
        """One of our backbones and upstream's, made once and not changed."""
        ours = self.backbone()
        return ours, self.upstream_backbone(ours)

    @functools.cached_property
    def lm_pair(self):
        """One of our tasks and upstream's, without a preprocessor."""
        ours = self.task(self.pair[0])
        upstream = self.upstream_task(self.pair[1])
        if self.name == "gemma3":
            # Upstream's returns images, of which there are none.
            normalize = upstream._normalize_generate_outputs
            upstream._normalize_generate_outputs = lambda outputs, *args: (
                normalize([_without_none(x) for x in outputs], *args)
            )
        return ours, upstream

    def text_lm(self):
        """One of our tasks with a preprocessor, greedy, to be changed."""
        preprocessor = self.preprocessor()
        size = preprocessor.tokenizer.vocabulary_size()
        lm = self.task(
            backbone=self.backbone(vocabulary_size=size),
            preprocessor=preprocessor,
        )
        lm.compile(sampler="greedy")
        return lm

    def preprocessor(self, sequence_length=16):
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            sequence_length=sequence_length,
        )


class EncoderDecoder(Family):
    """A family whose decoder reads what its encoder returns."""

    kind = "Seq2SeqLM"
    # What the encoder reads for a batch of two, and how long that becomes.
    source = SOURCE
    read_length = 7

    def inputs(self, token_ids, padding_mask):
        """What a backbone is called with, and the same for every encoder."""
        return {
            **self.source,
            "decoder_token_ids": token_ids,
            "decoder_padding_mask": padding_mask,
        }

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        # For what is generated not to be one token over and over.
        for weight in backbone.weights:
            if weight.name in ("beta", "bias"):
                weight.assign(weight - 1)
            elif "token_embedding" in weight.path:
                weight.assign(0.15 * weight)
            elif "position_embedding" in weight.path:
                weight.assign(4 * weight)
            elif "cross_attention" in weight.path and "output" in weight.path:
                weight.assign(0.3 * weight)
        return backbone

    def preprocessor(self, sequence_length=16):
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            encoder_sequence_length=sequence_length,
            decoder_sequence_length=sequence_length,
        )


class Stateful(Family):
    """A family with layers that keep a state in place of keys and values."""

    keeps_states = True

    @property
    def tolerance(self):
        # Of Qwen 3.5, the norm of what heads return enlarges what rounding
        # leaves: read whole or in steps, it is 1e-5 to 2.4e-5 away from what
        # the same weights come to in float64, RWKV-7 3e-6, on all backends.
        return 5e-5 if self.prefix.startswith("Qwen3_5") else 1e-5

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        # For a state to last longer than a token, and for what is read of it
        # not to be what rounding leaves.
        for weight in backbone.weights:
            if weight.name == "A_log":
                weight.assign(weight - 4)
            elif weight.name == "conv1d_kernel":
                weight.assign(weight * 3)
        return backbone


class Streams(Family):
    """A family with arguments of other names, one of them for each block."""

    def backbone(self, **kwargs):
        return super().backbone(**self._named(kwargs))

    def upstream_backbone(self, like, **kwargs):
        return super().upstream_backbone(like, **self._named(kwargs))

    def _named(self, kwargs):
        """Arguments of this family, of those that others have."""
        kwargs = dict(kwargs)
        for name, ours in (
            ("vocabulary_size", "text_vocab_size"),
            ("hidden_dim", "text_hidden_size"),
            ("num_layers", "num_hidden_layers"),
        ):
            if name in kwargs:
                kwargs[ours] = kwargs.pop(name)
        count = kwargs.get("num_hidden_layers")
        if count is not None:
            config = dict(self.config)
            for name in ("intermediate_size", "activation_sparsity_pattern"):
                kwargs[name] = (config[name] * count)[:count]
            # As many have keys and values of their own.
            own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
            kwargs.setdefault("num_kv_shared_layers", max(0, count - own))
        return kwargs


class FromSound(EncoderDecoder):
    """One whose encoder reads sound."""

    kind = "AudioToText"
    source = SOUND

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        for weight in backbone.weights:
            if "conv" in weight.path and weight.name == "bias":
                weight.assign(0.3 * weight)
        return backbone

    def upstream_backbone(self, like, **kwargs):
        # It takes names of dtypes, and no policies.
        kwargs.setdefault("dtype", like.dtype_policy.name)
        return super().upstream_backbone(like, **kwargs)

    def preprocessor(self, sequence_length=16):
        return keras_hub.models.MoonshineAudioToTextPreprocessor(
            keras_hub.layers.MoonshineAudioConverter(),
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            decoder_sequence_length=sequence_length,
        )


class WithPositions(Family):
    """A family of which upstream's models are told where each token stands.

    Ours know. In tests, so do upstream's.
    """

    def inputs(self, token_ids, padding_mask):
        return _with_positions(super().inputs(token_ids, padding_mask))

    def upstream_backbone(self, like, **kwargs):
        return _told_positions(super().upstream_backbone(like, **kwargs))

    def upstream_task(self, backbone, preprocessor=None):
        return _told_positions(super().upstream_task(backbone, preprocessor))


def _with_positions(inputs):
    """The same inputs of a model, with positions if there are none."""
    if not isinstance(inputs, dict) or "position_ids" in inputs:
        return inputs
    batch, length = inputs["token_ids"].shape
    positions = np.broadcast_to(np.arange(length), (batch, length))
    positions = positions.astype("int32")
    if ops.is_tensor(inputs["token_ids"]):
        positions = ops.convert_to_tensor(positions)
    return {**inputs, "position_ids": positions}


def _told_positions(model):
    """A model, called with positions whatever it is called with."""

    def call(self, inputs, *args, **kwargs):
        return super(cls, self).__call__(
            _with_positions(inputs), *args, **kwargs
        )

    cls = type(type(model).__name__, (type(model),), {"__call__": call})
    # It is saved as what it is.
    name = keras.saving.get_registered_name(type(model))
    object_registration.GLOBAL_CUSTOM_NAMES[cls] = name
    cls.__module__ = type(model).__module__
    model.__class__ = cls
    return model


class ImageText(Family):
    """A family that reads images with its text."""

    # What tasks with a preprocessor call the text.
    name_of_text: typing.ClassVar[str] = "prompts"
    # What backbones call images, and what their towers take beside them.
    name_of_images: typing.ClassVar[str] = "images"
    with_images: typing.ClassVar[tuple] = ()
    # What stands for an image in a prompt.
    mark: typing.ClassVar[str] = ""
    # Whether tokens of an image, or of a prompt, see what follows them.
    sees_ahead: typing.ClassVar[bool] = True
    # Whether upstream's has prompts see what the images before are filled up
    # with.
    mixes_prompts: typing.ClassVar[bool] = False
    # Parts of paths of weights that upstream's task makes a constant of.
    constants: typing.ClassVar[tuple] = ()
    # Other arguments, where all edits are to be possible.
    for_edits: typing.ClassVar[dict] = {}

    @property
    def decoded_as_read(self):
        """The same family, where upstream's steps go on as it reads."""
        return self

    @staticmethod
    def of_images_alone(backbone):
        """Layers that are called once for an image, whatever is generated."""
        tower = getattr(backbone, backbone.roles.images.tower)
        return [tower.get_layer("image_encoder")]

    def without_images(self):
        """The same decoder in a task that reads text."""
        plain = {
            name: x
            for name, x in self.config
            if name.split("_")[0] not in ("vit", "vision", "image")
        }
        backbone = models.GemmaBackbone(**plain)
        return models.GemmaCausalLM(backbone=backbone, preprocessor=None)

    def inputs(self, token_ids, padding_mask):
        """What a backbone is called with, and the same images for all.

        For a batch of two, of which all tokens but the last two of a row are
        read with its image.
        """
        response = np.zeros_like(padding_mask)
        response[:, -2:] = 1
        return {
            "images": IMAGES,
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "response_mask": response,
        }

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        # For what is generated to depend on what is read.
        for weight in backbone.weights:
            if "token_embedding" in weight.path or "tokens/" in weight.path:
                weight.assign(0.2 * weight)
        return backbone

    def preprocessor(self, sequence_length=16):
        size = dict(self.config)["image_size"]
        converter = self.upstream("ImageConverter")(image_size=(size, size))
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            image_converter=converter,
            sequence_length=sequence_length,
        )

    def upstream(self, kind):
        if kind == "ImageConverter":
            return getattr(keras_hub.layers, self.prefix + kind)
        return super().upstream(kind)


class ImagesInText(ImageText):
    """A family in whose text images stand, and whose tower is an argument.

    Each backbone has one of its own.
    """

    mark = "<start_of_image>"
    # What its tokenizer calls the token of an image.
    name_of_token = "image_placeholder_id"
    # What a user has to be seen.
    pictures: typing.ClassVar = IMAGES

    @property
    def config(self):
        return (*self._config, ("vision_encoder", self.tower()))

    def tower(self):
        return keras_hub.models.Gemma3VisionEncoder(
            image_size=16,
            patch_size=4,
            pool_size=2,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=24,
            output_dim=32,
        )

    @config.setter
    def config(self, given):
        object.__setattr__(self, "_config", given)

    def without_images(self):
        return self.task(self.ours("Backbone")(**dict(self._config)))

    def read(self, images):
        """What a backbone takes of images `(B, N, 16, 16, 3)`."""
        return {"images": images}

    def inputs(self, token_ids, padding_mask):
        """What a backbone is called with, and the same images for all.

        For a batch of two, with an image in each row.
        """
        indices = np.arange(4) + np.array([[1], [2]])
        mask = np.zeros_like(padding_mask)
        np.put_along_axis(mask, indices, 1, axis=1)
        return {
            **self.read(IMAGES[:, None]),
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "vision_indices": indices.astype("int32"),
            "vision_mask": mask,
        }

    @staticmethod
    def size_of(picture):
        """How many rows and columns of tokens it has."""
        return 1, 4

    def inputs_of_text(self, lm, token_ids, places, pictures):
        """What a backbone is called with, for all of a text at once.

        Args:
            lm: A task with a preprocessor.
            token_ids: int array `(1, T)`.
            places: int array, which of them are of images, at most three.
            pictures: What was seen, in the order of the text.
        """
        # What is not needed of three images is 0.
        seen = np.zeros((1, 3, *IMAGES.shape[1:]), "float32")
        seen[0, : len(pictures)] = pictures
        mask = np.zeros_like(token_ids)
        mask[0, places] = 1
        return {
            **self.read(seen),
            "token_ids": token_ids,
            "padding_mask": np.ones_like(token_ids),
            "vision_indices": np.pad(places, (0, 12 - len(places)))[None],
            "vision_mask": mask,
        }

    def converter(self):
        return self.upstream("ImageConverter")(image_size=(16, 16))

    def preprocessor(self, sequence_length=16, **kwargs):
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            image_converter=self.converter(),
            sequence_length=sequence_length,
            max_images_per_prompt=2,
            num_vision_tokens_per_image=4,
            **kwargs,
        )


class PatchesInText(ImagesInText, WithPositions):
    """A family in whose text images stand, which come as patches."""

    name_of_images = "pixel_values"
    with_images = ("pixel_position_ids",)
    mark = "<|image|>"
    # Upstream's steps have tokens of an image not see what follows them.
    decodes_wrong = True
    # None of its blocks reads what another one makes.
    for_edits = {"num_kv_shared_layers": 0}

    @functools.cached_property
    def decoded_as_read(self):
        config = dict(self._config, use_vision_bidirectional_attention=False)
        return type(self)(self.name, self.prefix, tuple(config.items()))

    def tower(self):
        return keras_hub.models.Gemma4VisionEncoder(
            image_size=16,
            patch_size=4,
            pool_size=2,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=24,
            head_dim=8,
            output_dim=32,
            position_embedding_size=8,
        )

    def inputs(self, token_ids, padding_mask):
        return _with_positions(super().inputs(token_ids, padding_mask))

    def read(self, images):
        count = images.shape[:2]
        # Rows and columns of patches, row by row.
        x = images.reshape(*count, 4, 4, 4, 4, 3).swapaxes(3, 4)
        places = np.stack(np.divmod(np.arange(16), 4)[::-1], axis=-1)
        return {
            "pixel_values": x.reshape(*count, 16, 48),
            "pixel_position_ids": np.tile(
                places.astype("int32"), (*count, 1, 1)
            ),
        }

    def converter(self):
        return self.upstream("ImageConverter")(
            patch_size=4, max_soft_tokens=4, pooling_kernel_size=2
        )


class ImagesByToken(Streams, ImagesInText):
    """A family in whose text images stand in the place of one token's id."""

    sees_ahead = False
    mixes_prompts = True
    # In its logits, where PyTorch goes on from the weight.
    if keras.config.backend() != "torch":
        constants = ("/embed_tokens/",)
    # None of its blocks reads what another one makes.
    for_edits = {"num_kv_shared_layers": 0}

    @ImagesInText.config.getter
    def config(self):
        return self._config

    @staticmethod
    def of_images_alone(backbone):
        return [backbone.image_tower]

    def without_images(self):
        # Whose vocabulary has tokens of images, too.
        return self.task(self.pair[0])

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        # For two images to be seen as different ones.
        for weight in backbone.vision_encoder.weights:
            if weight.name == "bias":
                weight.assign(weight - 1)
        # For what is read to decide what is generated.
        for weight in backbone.weights:
            if "post_attention_layernorm" in weight.path:
                weight.assign(3 * weight)
        # For that to be words, and no tokens that stand for none.
        embeddings = backbone.token_embedding.embedding.embeddings
        few = np.where(np.arange(embeddings.shape[0]) < 16, 0.1, 1.0)
        embeddings.assign(embeddings * few[:, None].astype("float32"))
        return backbone

    def _named(self, kwargs):
        if "vocabulary_size" in kwargs:
            # That of the tokenizer, before all pieces of words.
            kwargs = {"image_token_id": 4, **kwargs}
        return super()._named(kwargs)

    def inputs(self, token_ids, padding_mask):
        inputs = super().inputs(token_ids, padding_mask)
        image = dict(self.config)["image_token_id"]
        # No others stand for one.
        token_ids = np.where(token_ids == image, image - 1, token_ids)
        token_ids = np.where(inputs["vision_mask"], image, token_ids)
        return {**inputs, "token_ids": token_ids.astype("int32")}

    def preprocessor(self, sequence_length=16, **kwargs):
        return super().preprocessor(
            sequence_length, max_audios_per_prompt=0, **kwargs
        )


class WithQFormer(ImageText):
    """A family whose backbone is made of models, of new ones each time.

    Its `config` is what they are made with.
    """

    sees_ahead = False
    name_of_text = "text"
    vision = dict(
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )
    qformer = dict(
        num_query_tokens=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=24,
        intermediate_dim=32,
        vision_dim=16,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    language_model = "CustomOPT"

    @property
    def config(self):
        return tuple(self.arguments().items())

    @config.setter
    def config(self, given):
        object.__setattr__(self, "_config", given)

    def arguments(self, dtype=None, **kwargs):
        made = dict(
            vision_encoder=self.upstream("VisionEncoder")(
                image_size=16, dtype=dtype, **self.vision
            ),
            qformer=self.upstream("QFormer")(dtype=dtype, **self.qformer),
            language_model=self.upstream(self.language_model)(
                **dict(self._config, **kwargs), dtype=dtype
            ),
        )
        return made if dtype is None else dict(made, dtype=dtype)

    def without_images(self, **kwargs):
        model = self.upstream(self.language_model)(
            **{**dict(self._config), "num_query_tokens": 0, **kwargs}
        )
        return self.task(
            self.ours("Backbone")(
                vision_encoder=None, qformer=None, language_model=model
            )
        )

    @staticmethod
    def of_images_alone(backbone):
        return [
            backbone.vision_encoder.get_layer("encoder"),
            *backbone.qformer.transformer_layers,
            backbone.language_projection,
        ]

    def backbone(self, **kwargs):
        backbone = super().backbone(**kwargs)
        # For what is generated not to be the same over and over.
        for weight in backbone.weights:
            if weight.name in ("beta", "bias"):
                weight.assign(weight - 1)
            elif weight.shape[0] in (32, 48) and weight.name == "kernel":
                weight.assign(2 * weight)
            elif "language_projection" in weight.path:
                weight.assign(6 * weight)
        return backbone

    def inputs(self, token_ids, padding_mask):
        inputs = super().inputs(token_ids, padding_mask)
        return {k: x for k, x in inputs.items() if k != "response_mask"}

    def preprocessor(self, sequence_length=16):
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("OPTTokenizer")(
                **text.tokenizer_arguments(self.prefix)
            ),
            image_converter=self.upstream("ImageConverter")(
                image_size=(16, 16)
            ),
            sequence_length=sequence_length,
        )


class ImagesBeforeSource(EncoderDecoder, WithQFormer):
    """A family whose encoder reads images before its text."""

    language_model = "FlanT5"
    source = SOURCE_AND_IMAGES
    read_length = 7 + WithQFormer.qformer["num_query_tokens"]

    def arguments(self, dtype=None, **kwargs):
        made = super().arguments(dtype, **kwargs)
        # For weights of backbones to be all that there are of tasks, too.
        model = made["language_model"]
        model.lm_head.build((None, None, model.hidden_dim))
        self.as_trained(model)
        return made

    def as_trained(self, model):
        t5 = getattr(model, "language_model", model).t5
        for block in (
            *t5.encoder_transformer_layers,
            *t5.decoder_transformer_layers,
        ):
            block.input_projector.activation = _gelu_approximate
        return model

    def preprocessor(self, sequence_length=16):
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("FlanT5Tokenizer")(**text.tokenizer_arguments("T5")),
            image_converter=self.upstream("ImageConverter")(
                image_size=(16, 16)
            ),
            encoder_sequence_length=sequence_length,
            decoder_sequence_length=sequence_length,
        )


class ImagesInGrids(ImagesInText, Stateful):
    """A family in whose text images of any size stand, each in a grid."""

    # How many rows and columns of patches the images of each row have. Four
    # patches become a token.
    grids = (((4, 4), (2, 2)), ((2, 4), (2, 6)))
    # Where their tokens stand in it.
    places = ((0, 1, 2, 3, 6), (1, 2, 4, 5, 6))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    name_of_token = "image_token_id"
    pictures = 255 * IMAGES[0], 255 * np.tile(IMAGES[1, :8], (1, 2, 1))[:, :24]

    def tower(self):
        return Qwen3_5VisionEncoder(
            depth=1,
            hidden_size=16,
            num_heads=2,
            intermediate_size=24,
            patch_size=4,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=32,
            num_position_embeddings=16,
        )

    def inputs(self, token_ids, padding_mask):
        """What a backbone is called with, and the same images for all.

        For a batch of two, with two images in each row. Text goes on after the
        seventh token.
        """
        grids = np.array([[(1, *x) for x in row] for row in self.grids])
        count = grids[0].prod(axis=1).sum()
        rng = np.random.default_rng(4)
        pixels = rng.normal(size=(2, count, 2, 4, 4, 3)).astype("float32")
        first = token_ids.shape[1] * np.arange(2)[:, None]
        return {
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "pixel_values": pixels,
            "image_grid_thw": grids.astype("int32"),
            "vision_indices": (np.array(self.places) + first).astype("int32"),
        }

    @staticmethod
    def size_of(picture):
        return picture.shape[0] // 8, picture.shape[1] // 8

    def inputs_of_text(self, lm, token_ids, places, pictures):
        seen = lm.preprocessor._preprocess_images(list(pictures), True)
        grids = seen["image_grid_thw"]
        # What a tower does is not compiled.
        embeddings = lm.backbone.embed(
            {
                "token_ids": token_ids,
                "pixel_values": ops.convert_to_numpy(seen["pixel_values"]),
                "image_grid_thw": ops.convert_to_numpy(grids),
                "vision_indices": places,
            }
        )
        # By upstream's code, to which others than these are text.
        where = 0 * token_ids
        where[0, places] = lm.preprocessor.image_token_id
        positions = lm.preprocessor._compute_position_ids(where, grids, None)
        return {
            "token_ids": token_ids,
            "embeddings": embeddings,
            "position_ids": to_numpy(positions),
        }

    def preprocessor(self, sequence_length=16):
        converter = keras_hub.layers.Qwen3_5ImageConverter(
            patch_size=4, min_pixels=64, max_pixels=256, scale=1 / 255
        )
        return self.upstream(f"{self.kind}Preprocessor")(
            self.upstream("Tokenizer")(**text.tokenizer_arguments(self.prefix)),
            image_converter=converter,
            sequence_length=sequence_length,
        )


def _gelu_approximate(x):
    return keras.activations.gelu(x, approximate=True)


def _without_none(x):
    return {name: value for name, value in x.items() if value is not None}


def _family(name, prefix, config, cls=None, **kwargs):
    return (cls or Family)(name, prefix, tuple(dict(config, **kwargs).items()))


FAMILIES = (
    _family("gpt2", "GPT2", _GPT2),
    _family("gemma", "Gemma", _GEMMA),
    _family(
        "gemma2",
        "Gemma",
        _GEMMA,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=5.0,
        final_logit_soft_cap=10.0,
        use_sliding_window_attention=True,
        sliding_window_size=4,
    ),
    _family("llama", "Llama", _LLAMA),
    _family(
        "llama3",
        "Llama3",
        _LLAMA,
        tie_word_embeddings=True,
        rope_max_wavelength=500000,
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=16,
    ),
)

FAMILIES += (
    _family("opt", "OPT", _GPT2),
    _family("mistral", "Mistral", _LLAMA, sliding_window=4, head_dim=12),
    _family("mixtral", "Mixtral", _LLAMA, sliding_window=4, num_experts=4),
    _family("qwen", "Qwen", _LLAMA),
    _family(
        "qwen_moe",
        "QwenMoe",
        _LLAMA,
        moe_intermediate_dim=16,
        shared_expert_intermediate_dim=24,
        num_experts=4,
        top_k=2,
    ),
    # Windows, norms and layers in which upstream differs from the models as
    # they were trained are what `test_transformers_parity.py` is for.
    _family("qwen3", "Qwen3", _LLAMA, head_dim=12, layer_norm_epsilon=1e-5),
    _family(
        "qwen3_moe",
        "Qwen3Moe",
        _LLAMA,
        moe_intermediate_dim=16,
        head_dim=12,
        num_experts=4,
        top_k=2,
        norm_top_k_prob=True,
    ),
    _family("phi3", "Phi3", _LLAMA),
    _family("gpt_oss", "GptOss", _LLAMA, num_experts=4, sliding_window=64),
    _family("gpt_neo_x", "GPTNeoX", _HEADS, max_sequence_length=64),
    _family("bloom", "Bloom", _HEADS),
    _family("falcon", "Falcon", _FALCON, intermediate_dim=64),
    _family(
        "gemma3",
        "Gemma3",
        _GEMMA,
        image_size=16,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=4,
    ),
    _family(
        "smollm3",
        "SmolLM3",
        dict(
            vocabulary_size=VOCABULARY_SIZE,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_dim=32,
            intermediate_dim=48,
            attention_bias=False,
            attention_dropout=0.0,
            mlp_bias=False,
            rope_layer_enabled_list=[True, False] * 3,
            layer_types=["full_attention"] * 6,
            rope_theta=10000.0,
            layer_norm_epsilon=1e-6,
            max_position_embeddings=64,
            partial_rotary_factor=1.0,
        ),
    ),
)

_QWEN3_5 = dict(
    _LLAMA,
    head_dim=8,
    layer_types=["full_attention", "linear_attention"] * 3,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
)
FAMILIES += (
    _family("qwen3_5", "Qwen3_5", _QWEN3_5, cls=Stateful),
    _family(
        "qwen3_5_moe",
        "Qwen3_5Moe",
        {k: v for k, v in _QWEN3_5.items() if k != "intermediate_dim"},
        cls=Stateful,
        moe_intermediate_dim=16,
        shared_expert_intermediate_size=24,
        num_experts=4,
        top_k=2,
    ),
    _family(
        "rwkv7",
        "RWKV7",
        dict(
            vocabulary_size=VOCABULARY_SIZE,
            num_layers=2,
            hidden_size=32,
            head_size=8,
            intermediate_dim=48,
            gate_lora=8,
            mv_lora=8,
            aaa_lora=8,
            decay_lora=8,
        ),
        cls=Stateful,
    ),
)

_GEMMA4 = dict(
    _GEMMA,
    image_size=16,
    # The last one reads what the first one does.
    num_layers=3,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    num_kv_shared_layers=1,
    use_double_wide_mlp=True,
    sliding_window_size=4,
    # In the second one, keys are values, and turned in part.
    global_head_dim=16,
    num_global_key_value_heads=1,
    global_rope_partial_rotary_factor=0.5,
    hidden_size_per_layer_input=6,
)
FAMILIES += (_family("gemma4", "Gemma4", _GEMMA4, cls=WithPositions),)
_GEMMA3N = dict(
    text_vocab_size=VOCABULARY_SIZE,
    # Less, as in the published models.
    vocab_size_per_layer_input=90,
    text_hidden_size=32,
    num_hidden_layers=3,
    pad_token_id=0,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=[48] * 3,
    hidden_activation="gelu_approximate",
    activation_sparsity_pattern=[0.5, 0.0, 0.0],
    # The last one reads what the first one does.
    layer_types=["sliding_attention", "full_attention"] * 3,
    num_kv_shared_layers=1,
    sliding_window=4,
    rope_theta=1e6,
    max_position_embeddings=64,
    hidden_size_per_layer_input=8,
    altup_num_inputs=4,
    laurel_rank=4,
    final_logit_soft_cap=10.0,
)
FAMILIES += (_family("gemma3n", "Gemma3n", _GEMMA3N, cls=Streams),)

_GEMMA_SIDE = dict(
    hidden_dim=32,
    intermediate_dim=48,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_types=["sliding_attention", "full_attention"],
)
_GEMMA_SIDES = dict(
    **{f"encoder_{name}": x for name, x in _GEMMA_SIDE.items()},
    **{f"decoder_{name}": x for name, x in _GEMMA_SIDE.items()},
    query_pre_attn_scalar=8.0,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=10.0,
)
ENCODER_DECODERS = (
    _family("bart", "Bart", _GPT2, cls=EncoderDecoder),
    _family("t5", "T5", dict(_HEADS, dropout=0.0), cls=EncoderDecoder),
    _family(
        "t5gemma",
        "T5Gemma",
        dict(vocabulary_size=VOCABULARY_SIZE),
        cls=EncoderDecoder,
        # Wider than its encoder.
        **dict(_GEMMA_SIDES, decoder_hidden_dim=40),
        # Beyond, upstream's see one position more.
        sliding_window=64,
    ),
    _family(
        "t5gemma2",
        "T5Gemma2",
        dict(vocabulary_size=VOCABULARY_SIZE),
        cls=EncoderDecoder,
        **_GEMMA_SIDES,
        sliding_window=4,
    ),
    _family(
        "moonshine",
        "Moonshine",
        dict(vocabulary_size=VOCABULARY_SIZE),
        cls=FromSound,
        filter_dim=32,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=32,
        intermediate_dim=48,
        encoder_num_heads=4,
        decoder_num_heads=4,
        feedforward_expansion_factor=2,
    ),
    _family(
        "blip2_t5",
        "BLIP2",
        dict(_HEADS, dropout=0.0),
        cls=ImagesBeforeSource,
        num_query_tokens=4,
        qformer_hidden_dim=24,
    ),
)

IMAGE_MODELS = (
    _family(
        "pali_gemma",
        "PaliGemma",
        _GEMMA,
        cls=ImageText,
        image_size=16,
        vit_patch_size=8,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_num_layers=1,
        vit_intermediate_dim=24,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=5.0,
        final_logit_soft_cap=10.0,
        use_sliding_window_attention=True,
        sliding_window_size=7,
    ),
    _family(
        "gemma3_vision",
        "Gemma3",
        _GEMMA,
        cls=ImagesInText,
        image_size=16,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=7,
    ),
)

IMAGE_MODELS += (
    _family(
        "blip2",
        "BLIP2",
        _GPT2,
        cls=WithQFormer,
        num_query_tokens=4,
        qformer_hidden_dim=24,
    ),
)

IMAGE_MODELS += (
    _family(
        "gemma4_vision",
        "Gemma4",
        _GEMMA4,
        cls=PatchesInText,
        use_vision_bidirectional_attention=True,
        # Less than an image has.
        sliding_window_size=3,
    ),
)

IMAGE_MODELS += (
    _family(
        "gemma3n_vision",
        "Gemma3n",
        _GEMMA3N,
        cls=ImagesByToken,
        # Four tokens, of one convolution and two blocks.
        vision_encoder_config=dict(
            **convert_arch_def_to_stackwise([["er_r1_k3_s2_e1_c8"]] * 2),
            stem_size=8,
            num_features=8,
            image_shape=(16, 16, 3),
            use_msfa=False,
        ),
        vision_hidden_size=8,
        # As in the published models, it has no input for each layer.
        vision_vocab_offset=92,
        vision_vocab_size=8,
        image_token_id=95,
    ),
)

_IN_GRIDS = dict(head_dim=16, partial_rotary_factor=0.75)
GRID_MODELS = tuple(
    _family(
        f"{x.name}_vision",
        x.prefix,
        dict(x.config, **_IN_GRIDS),
        cls=ImagesInGrids,
        mrope_section=[2, 2, 2],
    )
    for x in FAMILIES
    if x.prefix.startswith("Qwen3_5")
)

if PATCHED:
    ENCODER_DECODERS = IMAGE_MODELS = GRID_MODELS = ()
    # Those that the patches cover.
    FAMILIES = tuple(
        x for x in FAMILIES if x.prefix in ("GPT2", "Gemma", "Llama", "Llama3")
    )

# Of what the core can meet, each has something that the others have not:
# gpt2: positions that are learned, LayerNorm, biases, a key for each query.
# gemma2: soft caps, windows, more norms, a kernel for each head, embeddings
#   that are scaled.
# llama3: queries that share keys, positions by rotation, rescaled, embeddings
#   that are tied and read by generation as a matrix.
DEEP = tuple(x for x in FAMILIES if x.name in ("gpt2", "gemma2", "llama3"))


def _with_name(family):
    # To leave these out, as the runs with the oldest Keras do.
    marks = () if family in DEEP else pytest.mark.not_deep
    return pytest.param(family, id=family.name, marks=marks)


def taking_turns(families, **counts):
    """Marks a test that is run with families, with all of them on PyTorch.

    Where a compiler makes it cost several times as much, only with some. Which
    ones, the name of the test says, so that each family has its turn, and those
    of JAX are not those of TensorFlow.

    Args:
        families: Sequence of families.
        **counts: How many there are on a backend, by its name.
    """
    backend = keras.config.backend()
    count = min(counts.get(backend, len(families)), len(families))

    def mark(test):
        first = zlib.crc32(test.__name__.encode())
        if backend == "tensorflow":
            first += counts["jax"]
        chosen = {(first + i) % len(families) for i in range(count)}
        return pytest.mark.parametrize(
            "family", [_with_name(families[i]) for i in sorted(chosen)]
        )(test)

    return mark


# For what defines a family, and for what could tell two apart: its seconds are
# multiplied by the number of families.
every_family = pytest.mark.parametrize(
    "family", [_with_name(x) for x in FAMILIES]
)
# For what defines a family whatever it reads beside a text.
any_family = pytest.mark.parametrize(
    "family",
    [
        _with_name(x)
        for x in (*FAMILIES, *ENCODER_DECODERS, *IMAGE_MODELS, *GRID_MODELS)
    ],
)
# For what only they have.
every_encoder_decoder = taking_turns(ENCODER_DECODERS, jax=1, tensorflow=1)
STATEFUL = tuple(x for x in FAMILIES if x.keeps_states)
every_stateful = taking_turns(STATEFUL, jax=1, tensorflow=1)
every_image_model = taking_turns(IMAGE_MODELS, jax=1, tensorflow=1)
# In whose text images stand, as it is with Gemma 3 and 4.
every_image_in_text = taking_turns(
    [x for x in IMAGE_MODELS if x.mark], jax=1, tensorflow=1
)
every_grid_model = taking_turns(GRID_MODELS, jax=1, tensorflow=1)
# Which a session may bring with any of its turns.
every_image_in_turns = taking_turns(
    [*(x for x in IMAGE_MODELS if x.mark), *GRID_MODELS], jax=1, tensorflow=1
)
# For what comes of upstream's code and of the lines that a family has, and not
# of a backend: all on PyTorch, which compiles nothing, and elsewhere one of
# each kind in turn. The deep ones, and:
# mixtral: experts.
# gpt_oss: experts of another kind, learned sinks.
# gpt_neo_x: one projection for all, branches side by side.
# bloom: biases of the logits.
# qwen3_5: states, in some layers.
# rwkv7: states, in all layers, and logits in the place of hidden states.
# gemma3n: keys and values of other layers, several streams of hidden states.
_KINDS = {x.name for x in DEEP}
_KINDS |= {"mixtral", "gpt_oss", "gpt_neo_x", "bloom"}
_KINDS |= {"qwen3_5", "rwkv7", "gemma3n"}
_EACH_KIND = [
    x for x in FAMILIES if x.name in _KINDS or keras.config.backend() == "torch"
]
each_kind = taking_turns(_EACH_KIND, jax=2, tensorflow=2)
# For what is of attention, which layers that keep a state have none of.
each_kind_that_attends = taking_turns(
    [x for x in _EACH_KIND if not x.keeps_states], jax=2, tensorflow=2
)
# Of each kind, those with an encoder and with images, too.
any_kind = taking_turns(
    [*_EACH_KIND, *ENCODER_DECODERS, *IMAGE_MODELS, *GRID_MODELS],
    jax=2,
    tensorflow=2,
)
# For what code does that does not ask which family it serves.
deep_families = taking_turns(DEEP, jax=1, tensorflow=1)
# For the suites that go deepest: compositions of edits, files, quantization,
# sessions. With Llama, whose logits have a matrix of their own.
deep_suites = taking_turns(
    [x for x in FAMILIES if x in DEEP or x.name == "llama"],
    jax=1,
    tensorflow=1,
)


def in_turn(names, values):
    """Each of many values with one of the deep families, by turns.

    For where it matters that all values are tried, and that not all are tried
    with one family, as with mistakes and with files of edits.

    Args:
        names: str. Names of further arguments of the test, as
            `pytest.mark.parametrize()` takes them.
        values: Iterable of values, or of tuples where there are several names.
    """
    several = "," in names
    parameters = []
    for i, value in enumerate(values):
        family = DEEP[i % len(DEEP)]
        value = value if several else (value,)
        words = [getattr(x, "__name__", str(x)) for x in value]
        parameters.append(
            pytest.param(family, *value, id="-".join([family.name, *words]))
        )
    return pytest.mark.parametrize(f"family, {names}", parameters)


def divided(values):
    """All of many values on PyTorch, half where a compiler takes the time.

    For what differs by our own code and not by a backend. JAX has the one half
    and TensorFlow the other.
    """
    values = list(values)
    half = -(-len(values) // 2)
    of_backend = {"jax": values[:half], "tensorflow": values[half:]}
    return of_backend.get(keras.config.backend(), values)


def on_one_backend(reason):
    """Marks a test that says the same on all backends, for PyTorch alone."""
    return pytest.mark.skipif(
        keras.config.backend() != "torch", reason=f"{reason} on PyTorch"
    )


# The real model takes long to load.
in_words = on_one_backend("the words of the real model are looked at")


def examples(count):
    """How many examples of a property to try, of `count` on PyTorch.

    Where they differ by what our own code does, which is the same on all
    backends, and not by what a backend computes, a quarter is tried on those
    on which each costs several times as much.
    """
    return count if keras.config.backend() == "torch" else -(-count // 4)


def randomize(model, seed=0):
    """Replaces the weights by larger ones than upstream initializes.

    As initialized, what attention adds to a hidden state is lost in rounding,
    and a test of attention could not fail.
    """
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if not keras.backend.is_float_dtype(weight.dtype):
            continue
        if len(weight.shape) < 2:
            value = 1 + 0.3 * rng.normal(size=weight.shape)
        elif "embedding" in weight.path:
            value = 0.5 * rng.normal(size=weight.shape)
        else:
            value = 0.2 * rng.normal(size=weight.shape)
        weight.assign(value)


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def compiled_as_it_is(function):
    """A model or one of its methods, compiled where that is cheaper.

    Called eagerly, JAX compiles every operation for every new shape. Weights
    become constants, so that it is to be called before the model changes.
    """
    if keras.config.backend() != "jax":
        return function
    import jax

    return jax.jit(lambda *args: function(*args))


# Of a model that never changes any more, for whoever calls it next.
compiled = functools.lru_cache(maxsize=32)(compiled_as_it_is)


def compiled_as_loops(function):
    """A function as a loop would have it compiled."""
    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    return function


def call_by_hand(block, x, pair, index):
    """Calls a decoder block on hidden states with its `(key, value)` pair.

    Returns:
        `(hidden_states, pair)`.
    """
    if PATCHED:
        name = block.cache_argument
        return block(x, **{name: pair, f"{name}_update_index": index})
    from keras_nlp_cache.cache.layer_cache import LayerCache

    (layer,) = block.remembering()
    entry = LayerCache.of_pair(pair, index, x.shape[1], layer.window)
    x, (pair,) = block(x, entries=(entry,))
    return x, pair


def decode(backbone, token_ids, splits, max_length=None, dtype=None, **extra):
    """Runs a sequence through a cache, a few tokens at a time.

    Args:
        backbone: One of our backbones.
        token_ids: Array `(B, T)`.
        splits: Sizes of the calls, which add up to `T`.
        max_length: Length of the cache. Defaults to `T`.
        dtype: Dtype of the cache.
        **extra: Further inputs, given for all `T` tokens and, in their last
            dimension where they have one, all slots.

    Returns:
        Hidden states `(B, T, hidden_dim)` as float32.
    """
    batch, length = token_ids.shape
    assert sum(splits) == length
    cache = backbone.make_cache(batch, max_length or length, dtype=dtype)
    outputs, index = [], 0
    call = compiled(backbone)
    for size in splits:
        now = slice(index, index + size)
        inputs = {
            "token_ids": token_ids[:, now],
            "cache": cache,
            "cache_update_index": index,
        }
        for name, value in extra.items():
            # A padding mask speaks of slots, the others of tokens.
            inputs[name] = value if name == "padding_mask" else value[:, now]
        output, cache = call(inputs)
        outputs.append(to_numpy(output))
        index += size
    return np.concatenate(outputs, axis=1)


def assert_greedy(lm, token_ids, start, end=None):
    """Tokens from `start` to `end` are what a call without a cache says.

    Args:
        lm: A task.
        token_ids: Array `(B, T)`.
        start: int. How many tokens were given.
        end: int. Defaults to `T`.
    """
    end = end or token_ids.shape[1]
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    logits = compiled_as_it_is(lm)(inputs)
    likeliest = to_numpy(logits).argmax(axis=-1)
    np.testing.assert_array_equal(
        token_ids[:, start:end], likeliest[:, start - 1 : end - 1]
    )


def assert_greedy_after(prompts, token_ids, lm):
    """Tokens after prompts are the likeliest ones, with no cache anywhere.

    One call on all of them says what a loop would: if each is the likeliest
    after those before it, all are those of the loop.
    """
    given = prompts["padding_mask"] == 1
    np.testing.assert_array_equal(token_ids[given], prompts["token_ids"][given])
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    logits = compiled_as_it_is(lm)(inputs)
    likeliest = to_numpy(logits).argmax(axis=-1)
    np.testing.assert_array_equal(
        token_ids[:, 1:][~given[:, 1:]], likeliest[:, :-1][~given[:, 1:]]
    )
