"""What Qwen 3.5 says, of images too."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.grid_image_lm import GridImageLM
from keras_nlp_cache.models.qwen3_5.backbone import Qwen3_5Backbone
from keras_nlp_cache.models.qwen3_5.preprocessor import (
    Qwen3_5CausalLMPreprocessor,
)


class GeneratesInGrids(GridImageLM):
    """What a task of Qwen 3.5 does about images."""

    def __init__(self, backbone, preprocessor=None, **kwargs):
        preprocessor = self.preprocessor_cls.over(preprocessor)
        super().__init__(backbone, preprocessor, **kwargs)

    def check_media_of(self, inputs):
        if getattr(self.preprocessor, "start_of_image_token", None) is not None:
            self.preprocessor.media_of(inputs)

    def most_tokens_of(self, images):
        converter = self.preprocessor.image_converter
        side = converter.patch_size * converter.spatial_merge_size
        count = 0
        for height, width, _ in (x.shape for x in images):
            # Those that are too small are made larger.
            larger = max(1, (converter.min_pixels / (height * width)) ** 0.5)
            rows, columns = (int(x * larger / side) for x in (height, width))
            count += (rows + 2) * (columns + 2)
        return count

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
        return super().call_with_cache(
            token_ids,
            cache,
            cache_update_index,
            padding_mask=padding_mask,
            img_embeddings=img_embeddings,
            vision_indices=vision_indices,
            position_ids=position_ids,
            **inputs,
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
