"""Prompts with images for Qwen 3.5, to each prompt its own."""

import keras_hub
import numpy as np
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.placeholders import of_each_prompt
from keras_nlp_cache.generate.reading import texts


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
