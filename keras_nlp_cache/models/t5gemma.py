"""T5Gemma: an encoder and a decoder of Gemma 2, with attention across."""

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.t5gemma import t5gemma_attention
from keras_hub.src.models.t5gemma import t5gemma_decoder
from keras_hub.src.models.t5gemma import t5gemma_encoder

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import EncoderBlock
from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.cache.slots import slot_distance
from keras_nlp_cache.cache.slots import slots
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.paired_seq_2_seq_lm import PairedSeq2SeqLM
from keras_nlp_cache.graph.encoder_decoder import EncoderDecoderBackbone


class PairedAttention(CachedAttention):
    """Attention of Gemma's in blocks that take two caches as a pair."""

    dropout_of_weights = "dropout_layer"
    returns_cache = True
    # Upstream's blocks keep it to themselves, and ours pass it on.
    window = None

    @property
    def scale(self):
        return self.scaling

    def rotary(self):
        return getattr(self, "rotary_embedding", None)


@replaces(t5gemma_attention.T5GemmaAttention)
class T5GemmaAttention(PairedAttention, t5gemma_attention.T5GemmaAttention):
    """Grouped-query attention that remembers, to a text or across."""

    def _all_at_once(self, x, attention_mask, **kwargs):
        # Upstream's is added to the logits.
        return super()._all_at_once(x, attention_mask[:, 0] > MASKED, **kwargs)

    def answer(self, x, cache, kwargs):
        if is_encoded(cache.key):
            x, _ = x
        return super().answer(x, cache, kwargs)


class PairedBlock:
    """Mixin for a decoder block of Gemma's that takes two caches as a pair.

    And hidden states together with what the encoder returned.
    """

    own_arguments = ("entries", "source")
    packs_source = True

    def own_parts(self):
        return {
            "attention": "post_self_attn_layernorm",
            "attention.norm": "pre_self_attn_layernorm",
            "attention.post_norm": "post_self_attn_layernorm",
            "feedforward": "post_feedforward_layernorm",
            "feedforward.norm": "pre_feedforward_layernorm",
            "feedforward.post_norm": "post_feedforward_layernorm",
            "feedforward.down": "mlp.down_proj",
            "feedforward.gate": "mlp.gate_proj",
            "feedforward.up": "mlp.up_proj",
        }

    def upstream_spec(self, *args, source=None, **kwargs):
        x = super().upstream_spec(*args, **kwargs)
        shape = self.num_key_value_heads, self.head_dim
        return x, tuple(
            keras.KerasTensor((None, 2, y.shape[1], *shape), self.compute_dtype)
            for y in (x, source)
        )


@replaces(t5gemma_decoder.T5GemmaDecoderLayer)
class T5GemmaDecoderLayer(
    PairedBlock, DecoderBlock, t5gemma_decoder.T5GemmaDecoderLayer
):
    """A block of the decoder, whose attention remembers."""

    def on_specialized(self):
        super().on_specialized()
        if self.layer_type == "sliding_attention":
            # Upstream counts the positions before the query's own.
            self.self_attn.window = self.sliding_window + 1


@replaces(t5gemma_encoder.T5GemmaEncoderLayer)
class T5GemmaEncoderLayer(EncoderBlock, t5gemma_encoder.T5GemmaEncoderLayer):
    """A block of the encoder, whose window slides if it has one."""

    def _make_attention_mask(self, hidden_states, padding_mask):
        mask = super()._make_attention_mask(hidden_states, padding_mask)
        if self.layer_type != "sliding_attention":
            return mask
        length = ops.shape(hidden_states)[1]
        distance = ops.absolute(slot_distance(0, length, slots(0, length)))
        near = additive(distance <= self.sliding_window)[:, None]
        return ops.minimum(mask, ops.cast(near, mask.dtype))


class PairedBackbone(EncoderDecoderBackbone):
    """An encoder and a decoder of Gemma's, with embeddings of their own."""

    blocks_name = "decoder_layers"
    encoder_blocks_name = "encoder_layers"

    @property
    def output_embedding(self):
        return self.decoder_token_embedding


@replaces(keras_hub.models.T5GemmaBackbone)
class T5GemmaBackbone(keras_hub.models.T5GemmaBackbone, PairedBackbone):
    """T5Gemma with a cache in its graph.

    A drop-in replacement for `keras_hub.models.T5GemmaBackbone`: the same
    arguments, weights and files. `EncoderDecoderBackbone` describes what it can
    be called with beyond upstream's inputs.

    Differs from upstream, on purpose: `sliding_window` holds in the encoder,
    too, and a token of the decoder sees that many, itself included, as the
    models were trained. Upstream's sees one more.

    Example:

    ```python
    sizes = dict(
        hidden_dim=32, intermediate_dim=64, num_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    backbone = keras_nlp_cache.models.T5GemmaBackbone(
        vocabulary_size=100, sliding_window=4,
        **{f"encoder_{name}": size for name, size in sizes.items()},
        **{f"decoder_{name}": size for name, size in sizes.items()},
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    outputs, cache = backbone({
        "encoder_token_ids": [[4, 5, 6]],
        "decoder_token_ids": [[1, 2, 3]],
        "cache": cache,
        "cache_update_index": 0,
    })
    ```

    Reference:
        https://arxiv.org/abs/2504.06225
    """

    def mend(self):
        for block in self.blocks:
            if block.layer_type == "sliding_attention":
                block.sliding_window -= 1
                block.self_attn.window -= 1


@replaces(keras_hub.models.T5GemmaSeq2SeqLM)
class T5GemmaSeq2SeqLM(PairedSeq2SeqLM, keras_hub.models.T5GemmaSeq2SeqLM):
    """T5Gemma that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.T5GemmaSeq2SeqLM`. See
    `Seq2SeqLM`.
    """

    backbone_cls = T5GemmaBackbone
