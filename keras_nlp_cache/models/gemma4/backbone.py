"""The backbone of Gemma 4."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.gemma4 import layers  # noqa: F401 (replace upstream)
from keras_nlp_cache.models.gemma4.media import MediaInText


@replaces(keras_hub.models.Gemma4Backbone)
class Gemma4Backbone(keras_hub.models.Gemma4Backbone, MediaInText):
    """Gemma 4 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma4Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder` or an `audio_encoder`, how images and sound are read.

    The last `num_kv_shared_layers` layers read the keys and values of earlier
    ones, and have no entries in the cache. Global layers have as many heads, of
    as many numbers, as they are said to, and so have their entries. With
    `enable_moe_block`, a decode step reads the experts that tokens choose.

    `position_ids` `(B, T)` may be left out. With a cache, they are what
    `token_positions` are.

    Images are `pixel_values` `(B, images, patches, numbers)`, and where their
    patches are in them `pixel_position_ids` `(B, images, patches, 2)`. Their
    tokens stand in the text, in one call all of them: where `vision_mask` `(B,
    T)` is not 0, in the order of `vision_indices`, counted from the first token
    of the call. Text needs none of these. With
    `use_vision_bidirectional_attention`, they see each other in layers that are
    not global, with a cache, too, where upstream's `generate()` has them see
    what came before alone.

    Sound is `audio_mel` `(B, clips, frames, mel_bins)`, and `audio_mel_mask`
    `(B, clips, frames)` is 0 for its padding. `audio_mask` and `audio_indices`
    say where its tokens are, as with images: these have as many places for each
    clip, and 0 for those that it does not need. A clip is read in one call, and
    its tokens see what came before, as those of text do. In the place of sound
    there may be `audio_embeddings`, what `encode_audio()` returns.

    Differs from upstream, on purpose: quantized, and with layers of the
    feed-forward network that an edit replaced, blocks compute what these layers
    do. Upstream's read the numbers that are stored in them.

    As upstream, and not as transformers 5.23: a token of an image sees all of
    the image, be it longer than `sliding_window_size`. There, the last ones do
    not see the first ones of such an image.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma4Backbone(
        vocabulary_size=100, image_size=16, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64, head_dim=8,
        sliding_window_pattern=2, num_kv_shared_layers=2,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    assert len(cache) == 2
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```
    """

    text_roles = Roles(beside_text=("position_ids",))
    media_roles = Roles(
        beside_text=("position_ids",),
        media=(
            Medium(
                "image",
                "pixel_values",
                beside=("pixel_position_ids", "vision_indices", "vision_mask"),
                with_given=("pixel_position_ids",),
                output="img_embeddings",
                join="interleave_embeddings",
            ),
            Medium(
                "audio",
                "audio_mel",
                beside=("audio_mel_mask", "audio_indices", "audio_mask"),
                with_given=("audio_mel_mask",),
                output="audio_embeddings",
                tower="audio_encoder",
                join="audio_interleave_embeddings",
                axes={
                    "audio_mel": ("batch", "clips", "frames", "mel_bins"),
                    "audio_mel_mask": ("batch", "clips", "frames"),
                    "audio_embeddings": (
                        "batch",
                        "clips",
                        "length",
                        "hidden_dim",
                    ),
                },
                one="clip",
            ),
        ),
        embeddings="embeddings",
    )
    windows_in_spans = False

    def mend(self):
        if any(x.use_bidirectional_attention for x in self.blocks):
            raise ValueError(
                "Expected `use_bidirectional_attention` to be `False`. "
                "Received: True. Attention to what follows has no cache."
            )

    def new_spans(self, inputs, **kwargs):
        sees_ahead = self.blocks[0].use_vision_bidirectional_attention
        if not self.sees or not sees_ahead:
            return None
        return super().new_spans(inputs, **kwargs)

    def _normalize(self, inputs):
        if isinstance(inputs, dict):
            inputs = self.without_unread(inputs)
        inputs = super()._normalize(inputs)
        positions = inputs["position_ids"]
        is_ours = inputs["attention_mask"] is not None or (
            inputs["cache"][0][0] is not None
        )
        if positions is None or not is_ours:
            return inputs
        if inputs["token_positions"] is not None:
            raise ValueError(
                "Expected `position_ids` or `token_positions`, which are the "
                "same with a cache or an `attention_mask`. Received both, of "
                f"shapes {tuple(positions.shape)} and "
                f"{tuple(inputs['token_positions'].shape)}."
            )
        return {**inputs, "token_positions": positions, "position_ids": None}
