"""PaliGemma 1 and 2: an image and a prompt before the text, as one prefix."""

import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.models.pali_gemma import pali_gemma_decoder_block

from keras_nlp_cache.blocks.decoder_block import decoder_block
from keras_nlp_cache.cache.spans import PrefixSpan
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.media_places import check_before_text
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.gemma import gemma_parts
from keras_nlp_cache.models.gemma import scale_as_trained

decoder_block(pali_gemma_decoder_block.PaliGemmaDecoderBlock, gemma_parts)


@replaces(keras_hub.models.PaliGemmaBackbone)
class PaliGemmaBackbone(keras_hub.models.PaliGemmaBackbone, ImageTextBackbone):
    """PaliGemma with a cache in its graph.

    A drop-in replacement for `keras_hub.models.PaliGemmaBackbone`: the same
    arguments, weights and files. `ImageTextBackbone` describes what it can be
    called with beyond upstream's inputs.

    What an image becomes takes the first `before` slots of a cache. The image
    and the prompt, those tokens whose `response_mask` is 0, all see each other,
    so one call has to have all of them. `response_mask` is `(B, T)`, as
    `token_ids`, and goes with an image: in later calls, all is response.

    Example:

    ```python
    backbone = keras_nlp_cache.models.PaliGemmaBackbone(
        vocabulary_size=100, image_size=16, num_layers=2, num_query_heads=4,
        num_key_value_heads=1, hidden_dim=32, intermediate_dim=64, head_dim=8,
        vit_patch_size=8, vit_num_heads=2, vit_hidden_dim=16, vit_num_layers=1,
        vit_intermediate_dim=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=16)
    hidden_states, cache = backbone({
        "images": np.ones((1, 16, 16, 3)),
        "token_ids": [[1, 2, 3]],
        "cache": cache,
        "cache_update_index": 0,
    })
    ```

    Differs from upstream, on purpose: with `query_head_dim_normalize=False`, as
    in PaliGemma 2 28B, logits are scaled as the model was trained, and as that
    argument says. Upstream does not pass it on.

    Reference:
        https://arxiv.org/abs/2407.07726, https://arxiv.org/abs/2412.03555
    """

    media_roles = Roles(
        media=(
            Medium(
                "image",
                "images",
                beside=("response_mask",),
                output="img_embeddings",
                tower="vit_encoder",
            ),
        ),
        embeddings="embeddings",
    )
    needs_images = True

    @property
    def before(self):
        return self.vit_encoder.image_sequence_length

    def mend(self):
        scale_as_trained(self.blocks)

    def new_spans(self, inputs, **kwargs):
        return PrefixSpan(self.before, **kwargs)(
            inputs["token_ids"],
            response_mask=inputs["response_mask"],
            images=inputs["images"],
            image_embeddings=inputs["img_embeddings"],
            embeddings=inputs["embeddings"],
        )

    def _normalize(self, inputs):
        inputs = super()._normalize(inputs)
        if inputs["padding_mask"] is None and inputs["cache"][0][0] is None:
            # Without one, upstream's blocks know of no prompt.
            inputs["padding_mask"] = ops.ones_like(inputs["token_ids"])
        return inputs

    def check_media(self, media, text):
        check_before_text(media, text, self)


@replaces(keras_hub.models.PaliGemmaCausalLM)
class PaliGemmaCausalLM(ImageTextLM, keras_hub.models.PaliGemmaCausalLM):
    """PaliGemma that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.PaliGemmaCausalLM`. See
    `ImageTextLM`.

    Differs from upstream, on purpose: prompts of different lengths are answered
    as each is alone, and if prompts come with `responses`, or with a
    `response_mask`, these are read as in training. Upstream's `generate()`
    reads the last tokens of longer prompts again, without what follows them,
    and all that is given as a prompt.
    """

    backbone_cls = PaliGemmaBackbone

    def start_session(self, path=None):
        self._refuse("start_session()")

    def generate_many(self, *args, **kwargs):
        self._refuse("generate_many()")

    def stream(self, *args, **kwargs):
        self._refuse("stream()")

    def chat(self, *args, **kwargs):
        self._refuse("chat()")

    def stream_chat(self, *args, **kwargs):
        self._refuse("stream_chat()")

    def score(self, *args, **kwargs):
        self._refuse("score()")

    def _refuse(self, method):
        raise ValueError(
            f"Expected a model that reads text alone for `{method}`. Received: "
            f"a `{type(self).__name__}`, whose text begins with an image. Call "
            "`generate()`."
        )

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_update_index,
        img_embeddings=None,
        padding_mask=None,
        **inputs,
    ):
        """Runs the model on some tokens of a sequence.

        Upstream's method, with its arguments and its results.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: As for `CausalLM.call_with_cache()`.
            cache_update_index: int scalar, the slot of the first token, or of
                the image before it.
            img_embeddings: Optional `(B, before, hidden_dim)`, from
                `encode_images()`.
            padding_mask: Optional `(B, T)` with these, 0 for what is no prompt.
                Otherwise as for the backbone.
            **inputs: Further optional inputs of the backbone.
        """
        if img_embeddings is not None:
            inputs["img_embeddings"] = img_embeddings
            if padding_mask is not None:
                inputs.setdefault("response_mask", ops.equal(padding_mask, 0))
        elif padding_mask is not None:
            inputs["padding_mask"] = padding_mask
        return super().call_with_cache(
            token_ids, cache, cache_update_index, **inputs
        )

    # === How images are read ===

    mask_of_text = 1

    def with_masks(self, inputs):
        # What is generated is response.
        is_response = inputs["padding_mask"] == 0
        if "response_mask" in inputs:
            is_response |= inputs["response_mask"] != 0
        return {**inputs, "response_mask": is_response.astype("int32")}

    def needed_with_images(self, mask, length):
        in_prompt = np.flatnonzero((mask == 0).any(axis=0))
        return self.backbone.before + in_prompt.max(initial=0) + 1

    def build_cache_of(self, inputs, seen):
        is_prompt = inputs["padding_mask"]
        if "response_mask" in inputs:
            is_prompt = ops.equal(inputs["response_mask"], 0)
        return self._build_cache(
            inputs["token_ids"], seen.get("img_embeddings"), is_prompt
        )

    def _build_cache(self, token_ids, img_embeddings, padding_mask):
        rows, length = ops.shape(token_ids)
        cache = self.backbone.make_cache(rows, self.backbone.before + length)
        return self.read(
            token_ids,
            cache,
            0,
            img_embeddings=img_embeddings,
            response_mask=ops.equal(padding_mask, 0),
        )
