"""Qwen 3.5: of four layers, three keep a state, and one keys and values."""

import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.models.qwen3_5 import qwen3_5_attention
from keras_hub.src.models.qwen3_5 import qwen3_5_decoder
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.recurrent import Recurrent
from keras_nlp_cache.attention.rotation import turned
from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.grid_image_lm import GridImageLM
from keras_nlp_cache.generate.image_placeholders import of_each_prompt
from keras_nlp_cache.generate.reading import texts
from keras_nlp_cache.graph.image_places import check_in_grids
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.roles import Roles

decoder_block(qwen3_5_decoder.Qwen3_5TransformerDecoder)

# What closes a gate. Of it, half precision still has a number.
_SHUT = -1e4


@replaces(qwen3_5_attention.Qwen3_5Attention)
class Qwen3_5Attention(CachedAttention, qwen3_5_attention.Qwen3_5Attention):
    """Attention that remembers, with a gate for what its heads return."""

    dropout_of_heads = "_dropout_layer"

    def compute_query_shape(self, input_shape):
        return *input_shape[:2], self.num_query_heads, self.head_dim

    def project(self, x, positions):
        query, gate = ops.split(self.heads("query", x), 2, axis=-1)
        query = self.rotate(self._query_norm(query), positions)
        key = self.rotate(self._key_norm(self.heads("key", x)), positions)
        return query, key, self.heads("value", x), gate

    def rotate(self, x, positions):
        if len(positions.shape) == 2:
            return super().rotate(x, positions)
        # In a grid: pairs of a head turn by time, height and width, by turns.
        size = self.rotary_dim
        pair = np.arange(size // 2)
        axis = pair % 3
        axis[pair >= 3 * np.array([0, *self.mrope_section[1:]])[axis]] = 0
        angle = ops.take(positions, axis.astype("int32"), axis=-1)
        angle = ops.cast(angle, "float32") * ops.cast(
            self.rotary_embedding_layer._get_inverse_freq(size), "float32"
        )
        return ops.concatenate(
            (turned(x[..., :size], angle), x[..., size:]), axis=-1
        )

    def merge_heads(self, x, gate):
        return super().merge_heads(x * ops.sigmoid(gate))


@replaces(qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet)
class Qwen3_5GatedDeltaNet(
    Recurrent, qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet
):
    """Linear attention, whose state is what it would otherwise attend to."""

    projections = {"query_key_value": "in_proj_qkv", "output": "out_proj"}

    @property
    def state_shapes(self):
        return StateShapes(
            key=(2 * self.key_dim + self.value_dim, self.conv_kernel_size - 1),
            value=(self.num_v_heads, self.head_k_dim, self.head_v_dim),
        )

    def compute_query_shape(self, input_shape):
        return *input_shape[:2], self.num_v_heads, self.head_v_dim

    def advance(self, x, state, real, kwargs):
        last, memory = state
        return qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet.call(
            self if real is None else _Padded(self, real),
            x,
            attention_mask=real,
            cache=(ops.cast(last, x.dtype), memory),
        )


class _Padded:
    """A layer whose gates are closed to padding.

    Upstream's code has memory fade over padding, and writes it.
    """

    def __init__(self, layer, real):
        self._layer, self._real = layer, real[:, :, None]

    def __getattr__(self, name):
        return getattr(self._layer, name)

    def in_proj_a(self, x):
        return ops.where(self._real, self._layer.in_proj_a(x), _SHUT)

    def in_proj_b(self, x):
        return ops.where(self._real, self._layer.in_proj_b(x), _SHUT)


class SeesInGrids:
    """What a backbone of Qwen 3.5 has because of its tower of images."""

    @property
    def image_roles(self):
        in_grids = any(block.mrope_section for block in self.blocks)
        return Roles(
            images="pixel_values",
            beside_images=("image_grid_thw", "vision_indices"),
            image_embeddings="img_embeddings",
            embeddings="embeddings",
            grid_positions="position_ids" if in_grids else None,
        )

    def mend(self):
        # Attention has no window.
        for block in self.blocks:
            if block.layer_type == "full_attention":
                block._self_attention_layer.sliding_window_size = None
        for layer in self.prefill_layers:
            # What has no weights upstream does not build, and Keras quantizes
            # no model before.
            layer.built = layer.built or not layer.weights

    def new_spans(self, inputs, **kwargs):
        return None

    def __call__(self, inputs, *args, **kwargs):
        # Without upstream's, which makes images of no size.
        return ImageTextBackbone.__call__(self, inputs, *args, **kwargs)

    def unpacked(self, images):
        def with_rows(name, rank):
            x = images.get(name)
            if x is None or isinstance(x, (list, tuple)):
                x = None if x is None else np.asarray(x)
            shape = getattr(x, "shape", ())
            return x[None] if len(shape) == rank - 1 else x

        ranks = {"pixel_values": 6, "image_grid_thw": 3, "vision_indices": 2}
        ranks["img_embeddings"] = 3
        found = {name: with_rows(name, rank) for name, rank in ranks.items()}
        empty = {k for k, x in found.items() if 0 in getattr(x, "shape", ())}
        if found["pixel_values"] is None or "pixel_values" in empty:
            # As upstream says that there are none.
            found.update(dict.fromkeys(empty))
        return {**images, **found}

    def check_images(self, images, text):
        merged = self.vision_encoder.spatial_merge_size
        check_in_grids(images, text, self.roles, merged)


@replaces(keras_hub.models.Qwen3_5Backbone)
class Qwen3_5Backbone(
    SeesInGrids, keras_hub.models.Qwen3_5Backbone, ImageTextBackbone
):
    """Qwen 3.5 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3_5Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder`, how images are read.

    Tokens of images stand in the text, and see no more than others of what
    follows them. So each call may read some, of which `vision_indices` says
    where in its `token_ids` they are, counted over all rows. Images are of any
    size, so rows may have different numbers of patches: then all are in one
    row, `pixel_values` is `(1, N, ...)`. Text needs none of these.

    With `mrope_section`, there is one more optional input, `position_ids`, `(B,
    4, T)`, as upstream's preprocessor makes it: where tokens stand, of which
    those of an image stand in a grid. Without it, all stand in a row, as in
    upstream's graph, which has no such input. Later calls go on from there:
    where a text stands is the last entry of a cache.

    Differs from upstream, on purpose: no attention has a window, as in the
    models that were trained. Upstream's has `sliding_window_size` on
    TensorFlow, and none elsewhere.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Qwen3_5Backbone(
        vocabulary_size=100, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2412.06464, https://arxiv.org/abs/2409.12191
    """


class ReadsOfEachPrompt:
    """What a preprocessor of Qwen 3.5 does about several prompts.

    Each is prepared with its own images, and videos, of any size. Upstream's
    counts those of the first prompt in all of them. And patches come in the
    order that the model was trained on, where upstream's come row by row.
    """

    @classmethod
    def over(cls, preprocessor):
        """One of this class, with what upstream's has, or another kind."""
        if preprocessor is None or type(preprocessor) not in cls.__bases__:
            return preprocessor
        names = "tokenizer", "image_converter", "video_converter", "name"
        config = {**preprocessor.get_config()}
        return cls(**{**config, **{x: getattr(preprocessor, x) for x in names}})

    @property
    def start_of_image_token(self):
        """What stands for an image in a prompt, `None` if nothing does."""
        return None if self.image_converter is None else self.image_token

    def media_of(self, inputs):
        """The images and the videos of each prompt.

        Args:
            inputs: Dictionary, as `generate()` takes it.

        Returns:
            `(strings, images, videos)`, lists of the same length, or `None` if
            prompts are something else than strings.
        """
        prompts = inputs["prompts"]
        strings = [prompts] if isinstance(prompts, str) else texts(prompts)
        if strings is None:
            return None
        return strings, *(
            of_each_prompt(strings, inputs.get(name), placeholder, name, rank)
            for name, placeholder, rank in (
                ("images", self.image_token, 3),
                ("videos", self.video_token, 4),
            )
        )

    def _preprocess_images(self, images, batched):
        found = super()._preprocess_images(images, batched)
        patches, grids = found["pixel_values"], found["image_grid_thw"]
        merged = self.image_converter.spatial_merge_size
        return {**found, "pixel_values": _side_by_side(patches, grids, merged)}

    def _preprocess_videos(self, videos, batched):
        found = super()._preprocess_videos(videos, batched)
        merged = self.video_converter.spatial_merge_size
        patches = _side_by_side(found["patches"], found["grid_thw"], merged)
        return {**found, "patches": patches}

    def generate_preprocess(self, x, sequence_length=None):
        read = super().generate_preprocess
        if not isinstance(x, dict):
            return read(x, sequence_length=sequence_length)
        if x.get("images") is None and x.get("videos") is None:
            return read(x["prompts"], sequence_length=sequence_length)
        media = self.media_of(x)
        if media is None:
            return read(x, sequence_length=sequence_length)
        rows = []
        for text, images, videos in zip(*media):
            given = {"images": tuple(images), "videos": tuple(videos)}
            given = {name: x for name, x in given.items() if x}
            text = {"prompts": [text], **given} if given else [text]
            row = read(text, sequence_length=sequence_length)
            rows.append({k: ops.convert_to_numpy(y) for k, y in row.items()})
        return _joined(rows)


def _side_by_side(patches, grids, merged):
    """Patches in another order: those that become a token, one by one.

    Args:
        patches: Array `(N, ...)`, those of each image row by row.
        grids: int array `(images, 3)`.
        merged: int. How many of a row, and how many rows, become one token.
    """
    patches, order = np.asarray(patches), []
    for count, height, width in np.asarray(grids).tolist():
        shape = count, height // merged, merged, width // merged, merged
        place = np.arange(count * height * width).reshape(shape)
        order.append(place.swapaxes(2, 3).reshape(-1) + sum(map(len, order)))
    return patches[np.concatenate(order)]


def _joined(rows):
    """What was made of prompts one by one, as of all at once."""
    length = rows[0]["token_ids"].shape[1]
    in_a_row = np.broadcast_to(np.arange(length, dtype="int32"), (1, 4, length))
    found = {"token_ids": [], "padding_mask": [], "position_ids": []}
    for i, row in enumerate(rows):
        row.setdefault("position_ids", in_a_row)
        if "vision_indices" in row:
            row["vision_indices"] = row["vision_indices"] + i * length
        for name, x in row.items():
            found.setdefault(name, []).append(x)
    return {
        name: ops.convert_to_tensor(np.concatenate(x))
        for name, x in found.items()
    }


@replaces(keras_hub.models.Qwen3_5CausalLMPreprocessor)
class Qwen3_5CausalLMPreprocessor(
    ReadsOfEachPrompt, keras_hub.models.Qwen3_5CausalLMPreprocessor
):
    """Prompts with images of their own, each.

    A drop-in replacement for `keras_hub.models.Qwen3_5CausalLMPreprocessor`.

    Differs from upstream, on purpose: the patches of an image are in the order
    that its tower was trained on, those side by side that become one token.
    Upstream's are row by row. And of several prompts, each is read with its own
    images, where upstream counts those of the first one in all.
    """


class GeneratesInGrids(GridImageLM):
    """What a task of Qwen 3.5 does about images."""

    def __init__(self, backbone, preprocessor=None, **kwargs):
        preprocessor = self.preprocessor_cls.over(preprocessor)
        super().__init__(backbone, preprocessor, **kwargs)

    def check_images_of(self, inputs):
        if getattr(self.preprocessor, "start_of_image_token", None) is not None:
            self.preprocessor.media_of(inputs)

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        padding_mask=None,
        img_embeddings=None,
        vision_indices=None,
        position_ids=None,
        **inputs,
    ):
        """Runs the model on some tokens of a sequence.

        Upstream's method, with its arguments and its results.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: As for `CausalLM.call_with_cache()`.
            cache_update_index: int scalar, the slot of the first token.
            padding_mask: Optional, as for the backbone.
            img_embeddings: Optional `(tokens, hidden_dim)`, from
                `encode_images()`.
            vision_indices: Optional int, where tokens of images are.
            position_ids: Optional int `(B, 4, T)`, where tokens stand.
            **inputs: Further optional inputs of the backbone.
        """
        given = {
            "padding_mask": padding_mask,
            "img_embeddings": img_embeddings,
            "vision_indices": vision_indices,
            "position_ids": position_ids,
        }
        given = {name: x for name, x in given.items() if x is not None}
        return super().call_with_cache(
            token_ids, cache, cache_update_index, **given, **inputs
        )


@replaces(keras_hub.models.Qwen3_5CausalLM)
class Qwen3_5CausalLM(GeneratesInGrids, keras_hub.models.Qwen3_5CausalLM):
    """Qwen 3.5 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Qwen3_5CausalLM`. See
    `CausalLM`, and for images `ImageTextLM`.

    Differs from upstream, on purpose: padding does not change what is
    remembered, and no token is read twice, so that steps are what the whole
    graph says. After an image, tokens stand where they stood in training, in
    steps, too: `position_ids`, which the preprocessor makes, say where a text
    goes on. Upstream's steps take the number of tokens for it. And each of
    several prompts is read with its own images, which may be of any size.
    """

    backbone_cls = Qwen3_5Backbone
    preprocessor_cls = Qwen3_5CausalLMPreprocessor
