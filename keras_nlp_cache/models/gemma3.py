"""Gemma 3: queries and keys are normalized, two bases for positions, images."""

import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.models.gemma3 import gemma3_attention
from keras_hub.src.models.gemma3 import gemma3_decoder_block
from keras_hub.src.models.gemma3 import gemma3_layers

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.image_placeholders import check_placeholders
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.graph.image_places import check_in_text
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.gemma import gemma_parts
from keras_nlp_cache.models.gemma import GemmaAttention
from keras_nlp_cache.models.gemma import scale_as_trained

decoder_block(gemma3_decoder_block.Gemma3DecoderBlock, gemma_parts)


@replaces(gemma3_attention.CachedGemma3Attention)
class CachedGemma3Attention(
    GemmaAttention, gemma3_attention.CachedGemma3Attention
):
    """Grouped-query attention that remembers."""


@replaces(keras_hub.models.Gemma3Backbone)
class Gemma3Backbone(keras_hub.models.Gemma3Backbone, ImageTextBackbone):
    """Gemma 3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder`, how images are read.

    Tokens of an image stand in the text, in one call all of them. They are
    where `vision_mask` `(B, T)` is not 0, and `vision_indices` says in which
    order, counted from the first token of the call. Text needs neither of them,
    and no `images`.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma3Backbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        head_dim=8, image_size=16,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Differs from upstream, on purpose: `query_head_dim_normalize=False`, as in
    Gemma 3 27B, and `layer_norm_epsilon` hold in all blocks. Upstream does not
    pass them on.

    Reference:
        https://arxiv.org/abs/2503.19786
    """

    image_roles = Roles(
        images="images",
        beside_images=("vision_indices", "vision_mask"),
        image_embeddings="img_embeddings",
        embeddings="embeddings",
    )

    def mend(self):
        if any(x.attention.use_bidirectional_attention for x in self.blocks):
            raise ValueError(
                "Expected `use_bidirectional_attention` to be `False`. "
                "Received: True. Attention to what follows has no cache."
            )
        scale_as_trained(self.blocks)
        for block in self.blocks:
            block.layer_norm_epsilon = self.layer_norm.epsilon
            for layer in block._flatten_layers():
                if isinstance(layer, gemma3_layers.RMSNormalization):
                    layer.epsilon = self.layer_norm.epsilon

    def _normalize(self, inputs):
        if self.sees and isinstance(inputs, dict):
            shape = getattr(inputs.get("images"), "shape", ())
            if len(shape) == 5 and shape[1] == 0:
                # As upstream's preprocessor says that there are none.
                none = {"images": None, "vision_indices": None}
                inputs = {**inputs, **none}
        return super()._normalize(inputs)

    def check_images(self, images, text):
        count = self.num_vision_tokens_per_image
        check_in_text(images, text, self.roles, count)


@replaces(keras_hub.models.Gemma3CausalLM)
class Gemma3CausalLM(ImageTextLM, keras_hub.models.Gemma3CausalLM):
    """Gemma 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma3CausalLM`. See
    `CausalLM`, and for images `ImageTextLM`.
    """

    backbone_cls = Gemma3Backbone
    sees_in_turns = True

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<end_of_turn>")

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        img_embeddings=None,
        vision_mask=None,
        padding_mask=None,
        vision_indices=None,
        cache_update_mask=None,
        **inputs,
    ):
        """Runs the model on some tokens of a sequence.

        Upstream's method, with its arguments and its results.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: As for `CausalLM.call_with_cache()`.
            cache_update_index: int scalar, the slot of the first token.
            img_embeddings: Optional `(images, tokens, hidden_dim)`, from
                `encode_images()`.
            vision_mask: Optional `(B, T)`, not 0 for tokens of images.
            padding_mask: Optional, as for the backbone.
            vision_indices: Optional int, where tokens of images are.
            cache_update_mask: `None`. Rows that are not to be written have an
                index of their own here.
            **inputs: Further optional inputs of the backbone.
        """
        if cache_update_mask is not None:
            raise ValueError(
                "Expected no `cache_update_mask`. Received one of shape "
                f"{tuple(cache_update_mask.shape)}. Pass a "
                "`cache_update_index` for each row, `(B,)`."
            )
        given = {
            "img_embeddings": img_embeddings,
            "vision_mask": vision_mask,
            "padding_mask": padding_mask,
            "vision_indices": vision_indices,
        }
        given = {name: x for name, x in given.items() if x is not None}
        return super().call_with_cache(
            token_ids, cache, cache_update_index, **given, **inputs
        )

    # === How images are read ===

    def check_images_of(self, inputs):
        placeholder = getattr(self.preprocessor, "start_of_image_token", None)
        if placeholder is not None:
            most = self.preprocessor.max_images_per_prompt
            check_placeholders(inputs, placeholder, most)

    def with_masks(self, inputs):
        mask, lengths = inputs["vision_mask"], inputs["padding_mask"]
        last = lengths.astype(bool).sum(axis=1) - 1
        ends = np.flatnonzero(mask[np.arange(len(mask)), last])
        if len(ends):
            raise ValueError(
                "Expected prompts to end with a token of text. Received: "
                f"prompt {ends[0]}, which ends with one of an image, at "
                f"{last[ends[0]]}."
            )
        return inputs

    def needed_with_images(self, mask, length):
        of_images = np.flatnonzero((mask != 0).any(axis=0))
        return of_images.max(initial=-1) + 1

    def build_cache_of(self, inputs, img_embeddings):
        seen = img_embeddings is not None
        return self._build_cache(
            inputs["token_ids"],
            img_embeddings,
            inputs["vision_mask"] if seen else None,
            inputs["padding_mask"],
            inputs["vision_indices"] if seen else None,
        )

    def _build_cache(
        self,
        token_ids,
        img_embeddings=None,
        vision_mask=None,
        padding_mask=None,
        vision_indices=None,
    ):
        cache = self.backbone.make_cache(*ops.shape(token_ids))
        images = {}
        if img_embeddings is not None:
            images = {
                "img_embeddings": img_embeddings,
                "vision_mask": vision_mask,
                "vision_indices": vision_indices,
            }
        return self.read(token_ids, cache, 0, **images)
