"""T5Gemma 2: one softmax over the text and what its encoder returned."""

import keras_hub
from keras_hub.src.models.t5gemma2 import t5gemma2_attention
from keras_hub.src.models.t5gemma2 import t5gemma2_decoder
from keras_hub.src.models.t5gemma2 import t5gemma2_encoder

from keras_nlp_cache.attention.joined import JoinedAttention
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import encoder_block
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.paired_seq_2_seq_lm import PairedSeq2SeqLM
from keras_nlp_cache.models.t5gemma import PairedAttention
from keras_nlp_cache.models.t5gemma import PairedBackbone
from keras_nlp_cache.models.t5gemma import PairedBlock

encoder_block(t5gemma2_encoder.T5Gemma2EncoderLayer)


@replaces(t5gemma2_attention.T5Gemma2MergedAttention)
class T5Gemma2MergedAttention(
    PairedAttention, JoinedAttention, t5gemma2_attention.T5Gemma2MergedAttention
):
    """Grouped-query attention that remembers both that it attends to."""

    def project_source(self, x):
        key, value = super().project_source(x)
        return self.key_norm(key) if self.use_query_key_norm else key, value

    # Upstream's mask has columns of both, and is added to the logits.

    def _all_at_once(self, x, attention_mask, cache=None, **kwargs):
        if cache == (None, None):
            cache = None
        mask = attention_mask[:, 0, :, : x.shape[1]] > MASKED / 2
        return super()._all_at_once(x, mask, cache)

    def source_at_once(self, encoder_hidden_states, attention_mask, **kwargs):
        length = encoder_hidden_states.shape[1]
        mask = attention_mask[:, :, :, -length:] > MASKED / 2
        return LayerCache(source=encoder_hidden_states, mask=additive(mask))


@replaces(t5gemma2_decoder.T5Gemma2DecoderLayer)
class T5Gemma2DecoderLayer(
    PairedBlock, DecoderBlock, t5gemma2_decoder.T5Gemma2DecoderLayer
):
    """A block of the decoder, whose attention remembers."""

    def on_specialized(self):
        super().on_specialized()
        if self.attention_type == "sliding_attention":
            self.merged_attn.window = self.sliding_window

    def _make_causal_mask(self, *args, **kwargs):
        if self._remembers_now():
            return None
        return super()._make_causal_mask(*args, **kwargs)

    def _make_cross_attention_mask(self, *args, **kwargs):
        if self._remembers_now():
            return None
        return super()._make_cross_attention_mask(*args, **kwargs)


@replaces(keras_hub.models.T5Gemma2Backbone)
class T5Gemma2Backbone(keras_hub.models.T5Gemma2Backbone, PairedBackbone):
    """T5Gemma 2 with a cache in its graph, for text.

    A drop-in replacement for `keras_hub.models.T5Gemma2Backbone`: the same
    arguments, weights and files. `EncoderDecoderBackbone` describes what it can
    be called with beyond upstream's inputs, and the example of
    `T5GemmaBackbone` is one of it, too. With a `vision_encoder`, it is refused.

    Reference:
        https://arxiv.org/abs/2512.14856
    """

    @classmethod
    def from_config(cls, config):
        if config.get("vision_encoder") is not None:
            return super().from_config(config)  # Which is refused in words.
        # Upstream's does not ask the classes behind it.
        return super(keras_hub.models.T5Gemma2Backbone, cls).from_config(config)


@replaces(keras_hub.models.T5Gemma2Seq2SeqLM)
class T5Gemma2Seq2SeqLM(PairedSeq2SeqLM, keras_hub.models.T5Gemma2Seq2SeqLM):
    """T5Gemma 2 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.T5Gemma2Seq2SeqLM`. See
    `Seq2SeqLM`.
    """

    backbone_cls = T5Gemma2Backbone

    # Upstream's have images among their arguments, which are `None` here.

    def call_encoder(
        self, token_ids, padding_mask, images=None, vision_indices=None
    ):
        """Upstream's method: `(encoder_output, padding_mask)`."""
        return super().call_encoder(token_ids, padding_mask)

    def _build_cache(self, *args, images=None, vision_indices=None, **kwargs):
        return super()._build_cache(*args, **kwargs)
