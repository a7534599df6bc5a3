"""What BLIP-2 says of an image, with Flan-T5."""

import keras_hub
import numpy as np
from keras import ops

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.prompts import check_pictures
from keras_nlp_cache.generate.seq_2_seq_lm import Seq2SeqLM
from keras_nlp_cache.models.blip2.backbone import BLIP2Backbone
from keras_nlp_cache.models.blip2.language_models import reads_with_t5


class _OfLayers(keras_hub.models.BLIP2Seq2SeqLM):
    """Upstream's task, for backbones that have no language model any more."""

    def __init__(self, backbone, preprocessor=None, **kwargs):
        self.backbone, self.preprocessor = backbone, preprocessor
        outputs = backbone.output_embedding(backbone(backbone.input))
        # Past upstream's, which asks that model for its last layer.
        super(keras_hub.models.BLIP2Seq2SeqLM, self).__init__(
            inputs=backbone.input, outputs=outputs, **kwargs
        )


@replaces(keras_hub.models.BLIP2Seq2SeqLM)
class BLIP2Seq2SeqLM(Seq2SeqLM, _OfLayers):
    """BLIP-2 with Flan-T5 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.BLIP2Seq2SeqLM`. See
    `Seq2SeqLM`. The encoder reads the `images` of prompts before their text,
    or text alone.

    Example:

    ```python
    backbone = BLIP2Backbone(
        vision_encoder=keras_hub.models.BLIP2VisionEncoder(
            image_size=16, patch_size=8, num_layers=1, num_heads=2,
            hidden_dim=16, intermediate_dim=24, use_patch_bias=True,
            use_class_token=True, use_mha_bias=True, use_mlp_bias=True,
            dropout_rate=0.0, layer_norm_epsilon=1e-6, initializer_range=0.02,
        ),
        qformer=keras_hub.models.BLIP2QFormer(
            num_query_tokens=4, num_layers=2, num_heads=2, hidden_dim=24,
            intermediate_dim=32, vision_dim=16, cross_attention_frequency=2,
            dropout=0.0, layer_norm_epsilon=1e-12,
        ),
        language_model=keras_hub.models.BLIP2FlanT5(
            vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
            intermediate_dim=64, num_query_tokens=4, qformer_hidden_dim=24,
        ),
    )
    lm = BLIP2Seq2SeqLM(backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    prompt = {
        "images": np.ones((1, 16, 16, 3)),
        "encoder_token_ids": np.array([[5, 6, 7]]),
        "encoder_padding_mask": np.array([[1, 1, 1]]),
        "decoder_token_ids": np.array([[0, 0, 0, 0, 0, 0]]),
        "decoder_padding_mask": np.array([[1, 0, 0, 0, 0, 0]]),
    }
    lm.generate(prompt, stop_token_ids=None)
    ```
    """

    backbone_cls = BLIP2Backbone

    @classmethod
    def is_for(cls, config):
        return reads_with_t5(config)

    def _logits(self, hidden_states):
        return self.backbone.output_embedding(hidden_states)

    # === What is read ===

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        **further,
    ):
        """Generates text from an image and what the encoder reads after it.

        Takes what `Seq2SeqLM.generate()` takes. Dictionaries may have `images`,
        one or a batch, as upstream's preprocessor takes them. Without a
        preprocessor, as the backbone does.
        """
        if isinstance(inputs, dict) and "images" in inputs:
            # By what is last, upstream sees whether there is one prompt.
            inputs = {"images": inputs["images"], **inputs}
        return super().generate(
            inputs, max_length, stop_token_ids, strip_prompt, **further
        )

    def check_read(self, inputs):
        super().check_read(inputs)
        if self.preprocessor is None or not isinstance(inputs, dict):
            return
        if "prompt" in inputs:
            return  # Which is looked at by itself.
        if inputs.get("encoder_text") is None:
            raise ValueError(
                "Expected `inputs` with `encoder_text`, a string or one for "
                f"each image. Received the keys {sorted(inputs)}. Without "
                'words for the encoder, pass `""`.'
            )
        if inputs.get("images") is not None:
            check_pictures(inputs["images"])

    def with_rows(self, inputs):
        images = inputs.get("images")
        if images is None:
            return {k: x for k, x in inputs.items() if k != "images"}
        if "images" not in self.backbone.roles.beside_source:
            raise ValueError(
                "Expected no `images` for a backbone without a "
                "`vision_encoder`. Received some of shape "
                f"{tuple(np.shape(images))}."
            )
        if not ops.is_tensor(images):
            images = np.asarray(images)
        one = len(images.shape) == 3
        return {**inputs, "images": images[None] if one else images}

    # === Upstream's methods ===

    def call_encoder(
        self, encoder_token_ids, encoder_padding_mask, images=None
    ):
        """Upstream's method: what the encoder returns, and its mask.

        Args:
            encoder_token_ids: int `(B, S)`.
            encoder_padding_mask: `(B, S)`, 0 for padding.
            images: Optional, as the backbone takes them, or one of them.

        Returns:
            `(sequence, mask)`, `(B, before + S, hidden_dim)` and
            `(B, 1, before + S)`.
        """
        beside = self.with_rows({"images": images})
        return tuple(
            self.backbone.encoded(
                encoder_token_ids, encoder_padding_mask, **beside
            )
        )

    def call_decoder(
        self,
        decoder_token_ids,
        decoder_padding_mask,
        encoder_hidden_states,
        encoder_attention_mask,
    ):
        """Upstream's method: the hidden states of the decoder, with no cache.

        Args:
            decoder_token_ids: int `(B, T)`.
            decoder_padding_mask: Optional `(B, T)`, 0 for padding.
            encoder_hidden_states: From `call_encoder()`.
            encoder_attention_mask: From `call_encoder()`.
        """
        return self.backbone(
            {
                "decoder_token_ids": decoder_token_ids,
                "decoder_padding_mask": decoder_padding_mask,
                "encoder_sequence": encoder_hidden_states,
                "encoder_padding_mask": encoder_attention_mask[:, 0],
            }
        )

    def call_decoder_with_cache(
        self,
        decoder_token_ids,
        encoder_hidden_states,
        encoder_attention_mask,
        self_attention_cache,
        self_attention_cache_update_index,
        cross_attention_cache,
        cross_attention_cache_update_index,
    ):
        """Upstream's method: `Seq2SeqLM`'s, with its arguments in its order.

        The mask is that of `call_encoder()`.
        """
        return super().call_decoder_with_cache(
            encoder_hidden_states,
            encoder_attention_mask[:, 0],
            decoder_token_ids,
            self_attention_cache,
            self_attention_cache_update_index,
            cross_attention_cache,
            cross_attention_cache_update_index,
        )

    def _build_cache(
        self, encoder_hidden_states, encoder_attention_mask, decoder_token_ids
    ):
        caches = self._initialize_cache(
            encoder_hidden_states, decoder_token_ids
        )
        _, hidden_states, *caches = self.call_decoder_with_cache(
            decoder_token_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            caches[0],
            0,
            caches[1],
            0,
        )
        return hidden_states, *caches
