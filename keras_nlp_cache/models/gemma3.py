"""Gemma 3: queries and keys are normalized, two bases for positions, images."""

import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.models.gemma3 import gemma3_attention
from keras_hub.src.models.gemma3 import gemma3_decoder_block
from keras_hub.src.models.gemma3 import gemma3_layers

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.graph.image_inputs import check_length
from keras_nlp_cache.graph.image_inputs import check_rows
from keras_nlp_cache.graph.image_inputs import known
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
        token_ids = text["token_ids"]
        vision_mask = known(images["vision_mask"])
        if images["vision_mask"] is not None:
            check_rows("vision_mask", images["vision_mask"], token_ids)
            check_length(
                "vision_mask",
                images["vision_mask"],
                token_ids.shape[1],
                token_ids,
            )
        if not self.roles.has_images(images):
            if vision_mask is not None and vision_mask.any():
                raise ValueError(
                    "Expected `images` for the tokens that `vision_mask`, of "
                    f"shape {vision_mask.shape}, says are of images. Received: "
                    f"none, for {int((vision_mask != 0).sum())} such tokens."
                )
            return
        if images["embeddings"] is not None:
            check_rows("embeddings", images["embeddings"], token_ids)
            check_length(
                "embeddings",
                images["embeddings"],
                token_ids.shape[1],
                token_ids,
            )
        else:
            self._check_places(images, token_ids)
        if vision_mask is not None:
            self._check_whole(vision_mask != 0)

    def _check_places(self, images, token_ids):
        """Checks that each token of an image has a place in the text."""
        missing = [
            name for name in self.roles.beside_images if images[name] is None
        ]
        given = "images" if images["images"] is not None else "img_embeddings"
        shape = tuple(images[given].shape)
        if missing:
            raise ValueError(
                "Expected `vision_indices` and `vision_mask` with images, to "
                f"say where in the text they are. Received: `{given}` of shape "
                f"{shape}, and no {' and no '.join(missing)}."
            )
        indices = images["vision_indices"]
        check_rows("vision_indices", indices, token_ids)
        count = None
        if given == "images":
            check_rows(given, images[given], token_ids)
            count = images[given].shape[1]
        elif None not in (shape[0], token_ids.shape[0]):
            count = shape[0] // token_ids.shape[0]
        if count is not None:
            check_length(
                "vision_indices",
                indices,
                count * self.num_vision_tokens_per_image,
                token_ids,
            )
        indices, mask = known(indices), known(images["vision_mask"])
        if indices is None or mask is None:
            return
        # Those that are not needed are 0.
        for row, (found, said) in enumerate(zip(indices, mask)):
            said = np.flatnonzero(said)
            if list(said) != list(found[found != 0]):
                raise ValueError(
                    "Expected `vision_indices` to name the tokens where "
                    f"`vision_mask` is not 0. Received, in row {row}: "
                    f"{found.tolist()}, and a mask that is not 0 at "
                    f"{said.tolist()}."
                )
        if not mask.any():
            raise ValueError(
                f"Expected `vision_mask`, of shape {mask.shape}, to say where "
                f"images are. Received: `{given}` of shape {shape}, and a mask "
                "of zeros. Put a placeholder for each image into a prompt."
            )

    def _check_whole(self, mask):
        """Checks that images are whole, whose tokens see each other."""
        count = self.num_vision_tokens_per_image
        for row, inside in enumerate(mask):
            ends = np.diff(np.pad(inside.astype(int), 1))
            lengths = np.flatnonzero(ends == -1) - np.flatnonzero(ends == 1)
            if (lengths % count).any():
                raise ValueError(
                    f"Expected each image to have {count} tokens side by side, "
                    "all of them in one call. Received a `vision_mask` of "
                    f"shape {mask.shape} with {lengths.tolist()} in row {row}."
                )


@replaces(keras_hub.models.Gemma3CausalLM)
class Gemma3CausalLM(ImageTextLM, keras_hub.models.Gemma3CausalLM):
    """Gemma 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma3CausalLM`. See
    `CausalLM`, and for images `ImageTextLM`.
    """

    backbone_cls = Gemma3Backbone

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
        if placeholder is None or not isinstance(inputs, dict):
            return
        if "prompts" not in inputs:
            return
        prompts = inputs["prompts"]
        wanted = _counts(prompts, lambda text: text.count(placeholder))
        images = inputs.get("images")
        if isinstance(prompts, str) and images is not None:
            images = [images]
        given = [0] * len(wanted or ()) if images is None else _images(images)
        if None in (wanted, given) or list(wanted) == list(given):
            return
        raise ValueError(
            f"Expected as many {placeholder!r} in each of `prompts` as there "
            f"are `images` for it. Received: {list(wanted)} of them, for "
            f"{list(given)} images."
        )

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


def _counts(prompts, count):
    """What is counted in each of some strings, `None` if it is not known."""
    if isinstance(prompts, str):
        return [count(prompts)]
    strings = reading.texts(prompts)
    return None if strings is None else [count(text) for text in strings]


def _images(images):
    """How many images there are for each prompt, `None` if it is not known."""
    found = []
    for x in images:
        rank = len(getattr(x, "shape", ()))
        if not isinstance(x, (list, tuple)) and rank not in (3, 4):
            return None
        found.append(1 if rank == 3 else len(x))
    return found
