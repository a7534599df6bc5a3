"""Moonshine: an encoder of sound, and rotations that blocks are given."""

import keras_hub
from keras import ops
from keras_hub.src.models.moonshine import moonshine_backbone
from keras_hub.src.models.moonshine import moonshine_decoder
from keras_hub.src.models.moonshine import moonshine_encoder
from keras_hub.src.models.moonshine import moonshine_layers
from keras_hub.src.models.moonshine import moonshine_multi_head_attention

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import encoder_block
from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.seq_2_seq_lm import Seq2SeqLM
from keras_nlp_cache.graph.encoder_decoder import EncoderDecoderBackbone
from keras_nlp_cache.graph.roles import ENCODER_DECODER
from keras_nlp_cache.layers.specializing import Specialized

encoder_block(moonshine_encoder.MoonshineEncoderBlock)


@replaces(moonshine_backbone.Arange)
class Arange(Specialized, moonshine_backbone.Arange):
    """Where tokens stand, which a call with a cache is told."""

    own_arguments = ("positions",)

    def call(self, inputs, positions=None):
        return super().call(inputs) if positions is None else positions


@replaces(moonshine_layers.MoonshineRotaryEmbedding)
class MoonshineRotaryEmbedding(
    Specialized, moonshine_layers.MoonshineRotaryEmbedding
):
    """Angles by which to rotate, of positions `(T,)` or `(B or 1, T)`."""

    def call(self, t):
        if len(t.shape) == 1:
            return super().call(t)
        positions = ops.cast(t, ops.dtype(self.inv_freq))
        return ops.repeat(positions[..., None] * self.inv_freq, 2, axis=-1)


@replaces(moonshine_multi_head_attention.MoonshineMultiHeadAttention)
class MoonshineMultiHeadAttention(
    CachedAttention, moonshine_multi_head_attention.MoonshineMultiHeadAttention
):
    """Multi-head attention that remembers, to a text or across."""

    dropout_of_weights = "_dropout_layer"

    @property
    def scale(self):
        return self._key_dim**-0.5

    def answer(self, x, cache, kwargs):
        if not is_encoded(cache.key):
            # All that it is to know of positions.
            cache = cache._replace(positions=kwargs["rotary_embedding"])
        return super().answer(x, cache, kwargs)

    def rotate(self, x, positions):
        angles = positions if len(positions.shape) == 3 else positions[None]
        angles = angles[:, :, None]
        size = angles.shape[-1]
        turned, rest = x[..., :size], x[..., size:]
        turned = turned * ops.cos(angles) + (
            moonshine_multi_head_attention._rotate_half(turned)
            * ops.sin(angles)
        )
        return ops.concatenate([ops.cast(turned, x.dtype), rest], axis=-1)


@replaces(moonshine_decoder.MoonshineDecoderBlock)
class MoonshineDecoderBlock(
    DecoderBlock, moonshine_decoder.MoonshineDecoderBlock
):
    """A block of the decoder, whose attention remembers."""

    source_mask_argument = "encoder_padding_mask"

    def own_parts(self):
        return {
            "attention": "self_attention._output_dense",
            "attention.norm": "norm1",
            "feedforward": "ff.dense_2",
            "feedforward.norm": "norm3",
            "feedforward.down": "ff.dense_2",
            "feedforward.up": "ff.dense_1",
        }


@replaces(keras_hub.models.MoonshineBackbone)
class MoonshineBackbone(
    keras_hub.models.MoonshineBackbone, EncoderDecoderBackbone
):
    """Moonshine with a cache in its graph.

    A drop-in replacement for `keras_hub.models.MoonshineBackbone`: the same
    arguments, weights and files. `EncoderDecoderBackbone` describes what it can
    be called with beyond upstream's inputs. In the place of
    `"encoder_token_ids"`, the encoder reads `"encoder_input_values"`, float
    `(B, samples, 1)`. Its `"encoder_padding_mask"` is of samples. With an
    `"encoder_sequence"`, it is of that, as returned by a call as
    `"encoder_attention_mask"`.

    The first layers normalize over all samples, padding included, so that a
    recording is not heard the same with more of that.

    Example:

    ```python
    backbone = keras_nlp_cache.models.MoonshineBackbone(
        vocabulary_size=100, filter_dim=32, encoder_num_layers=2,
        decoder_num_layers=2, hidden_dim=32, intermediate_dim=64,
        encoder_num_heads=4, decoder_num_heads=4,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    outputs, cache = backbone({
        "encoder_input_values": np.random.normal(size=(1, 1600, 1)),
        "decoder_token_ids": [[1, 2, 3]],
        "cache": cache,
        "cache_update_index": 0,
    })
    ```

    Reference:
        https://arxiv.org/abs/2410.15608
    """

    roles = ENCODER_DECODER._replace(source_ids="encoder_input_values")
    blocks_name = "decoder_blocks"
    encoder_blocks_name = "encoder_blocks"
    # An attribute of upstream's, and no property.
    encoder_blocks = None

    def __init__(self, *args, dtype=None, **kwargs):
        # Upstream's code takes names of dtypes, and no policies.
        dtype = getattr(dtype, "default_policy", dtype)
        dtype = getattr(dtype, "name", dtype)
        super().__init__(*args, dtype=dtype, **kwargs)

    def encoded_length(self, length, beside=None):
        for kernel, stride in ((127, 64), (7, 3), (3, 2)):
            length = (length - kernel) // stride + 1
        return max(length, 0)


@replaces(keras_hub.models.MoonshineAudioToText)
class MoonshineAudioToText(Seq2SeqLM, keras_hub.models.MoonshineAudioToText):
    """Moonshine that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.MoonshineAudioToText`. See
    `Seq2SeqLM`. What follows an end token is padding, which it is not in what
    upstream's returns.
    """

    backbone_cls = MoonshineBackbone

    def call_encoder(self, encoder_input_values, padding_mask):
        """Upstream's method: what the encoder returns, and its mask."""
        return tuple(self.backbone.encoded(encoder_input_values, padding_mask))

    def call_decoder_with_cache(
        self,
        encoder_hidden_states,
        encoder_padding_mask,
        decoder_token_ids,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
        cross_attention_cache=None,
    ):
        """Upstream's method: `Seq2SeqLM`'s, but for one argument.

        Whether the decoder has read what the encoder returned, its cache says.
        """
        is_read = cross_attention_cache[0][0].length > 0
        return super().call_decoder_with_cache(
            encoder_hidden_states,
            encoder_padding_mask,
            decoder_token_ids,
            self_attention_cache,
            self_attention_cache_update_index,
            cross_attention_cache,
            None if is_read else 0,
        )

    def _build_cache(
        self,
        encoder_input_values,
        encoder_padding_mask,
        decoder_token_ids,
        decoder_padding_mask,
    ):
        source = self.call_encoder(encoder_input_values, encoder_padding_mask)
        caches = self._initialize_cache(None, decoder_token_ids)
        _, hidden_states, *caches = self.call_decoder_with_cache(
            *source, decoder_token_ids, caches[0], 0, caches[1]
        )
        return hidden_states, *caches, *source
