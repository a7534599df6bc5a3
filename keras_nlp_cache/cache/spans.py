"""Spans of a text whose tokens see each other, whatever their order.

Of a decoder that reads images, some tokens see what follows them: in Gemma 3
those of one image, in PaliGemma those of the image and of the prompt. Both are
*spans*, numbers for the tokens of one call: tokens of one number see each
other, beside all that came before. 0 is for a token that is in no span.

What a token of a span becomes depends on all the others, in every layer. So a
span is read in one call. In what follows, tokens see it as they see any text,
and a decode step has no spans.
"""

import keras
from keras import ops

from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.shared_inputs import AttentionMask
from keras_nlp_cache.cache.shared_inputs import Behind
from keras_nlp_cache.cache.shared_inputs import Positions
from keras_nlp_cache.cache.shared_inputs import Weightless
from keras_nlp_cache.cache.slots import columns
from keras_nlp_cache.cache.slots import slots


class PositionsAfter(Positions):
    """Where each token stands, and before them what an image became.

    Args:
        before: int. How many positions an image takes, before the text.

    Call arguments are those of `Positions`, and:
        images: Optional. What else than the text there is, like the next two.
        image_embeddings: Optional.
        embeddings: Optional.
    """

    def __init__(self, before, **kwargs):
        super().__init__(**kwargs)
        self.before = before

    def call(
        self,
        token_ids,
        index=None,
        token_positions=None,
        attention_mask=None,
        images=None,
        image_embeddings=None,
        embeddings=None,
    ):
        if token_positions is not None:
            return ops.cast(token_positions, "int32")
        # Upstream's code knows texts that follow an image, and no others.
        as_upstream = images is not None or not self.before
        if index is None and attention_mask is None and as_upstream:
            return None
        length = ops.shape(token_ids)[1]
        if any(x is not None for x in (images, image_embeddings, embeddings)):
            length = length + self.before
        return slots(0 if index is None else index, length)

    def compute_output_spec(self, token_ids, *args, **kwargs):
        length = None if self.before else token_ids.shape[1]
        return keras.KerasTensor((None, length), "int32")


class PrefixSpan(Weightless):
    """One span of an image and of a prompt, all but a response.

    Args:
        before: int. How many positions the image takes.

    Call arguments:
        token_ids: int `(B, T)`.
        response_mask: Optional `(B, T)`, 0 for the prompt. Defaults to that.
        images: Optional. Without these three there is no span.
        image_embeddings: Optional.
        embeddings: Optional.

    Returns:
        int32 `(B, before + T)`, or `None`.
    """

    def __init__(self, before, **kwargs):
        super().__init__(**kwargs)
        self.before = before

    def call(
        self,
        token_ids,
        response_mask=None,
        images=None,
        image_embeddings=None,
        embeddings=None,
    ):
        if images is None and image_embeddings is None and embeddings is None:
            return None
        span = ops.ones_like(token_ids)
        if response_mask is not None:
            span = ops.cast(ops.equal(response_mask, 0), "int32")
        return ops.pad(span, ((0, 0), (self.before, 0)), constant_values=1)

    def compute_output_spec(self, *args, **kwargs):
        return keras.KerasTensor((None, None), "int32")


class ImageSpans(Weightless):
    """A span of each image in a text.

    Call arguments:
        vision_mask: Optional `(B, T)`, not 0 for a token of an image. Those of
            one image stand side by side, those of two do not.

    Returns:
        int32 `(B, T)`, or `None`.
    """

    def call(self, vision_mask):
        if vision_mask is None:
            return None
        inside = ops.cast(ops.not_equal(vision_mask, 0), "int32")
        before = ops.pad(inside, ((0, 0), (1, 0)))[:, :-1]
        first = ops.cast(inside > before, "int32")
        return inside * ops.cumsum(first, axis=1)

    def compute_output_spec(self, vision_mask):
        return keras.KerasTensor(vision_mask.shape, "int32")


class SpanMask(AttentionMask):
    """What each token may attend to, with spans.

    A padding mask without a cache is of the last positions, those of the text.

    Args:
        window: As for `AttentionMask`.
        window_in_spans: bool. Whether it holds in spans, too: forward as far as
            backward. Defaults to `True`.

    Call arguments are those of `AttentionMask`, and:
        spans: Optional int32 `(B, T)`.
    """

    def __init__(self, window=None, window_in_spans=True, **kwargs):
        super().__init__(window, **kwargs)
        self.window_in_spans = window_in_spans

    def call(
        self,
        positions,
        padding_mask=None,
        key=None,
        index=None,
        attention_mask=None,
        token_positions=None,
        spans=None,
    ):
        if positions is None:
            return None
        if padding_mask is not None and key is None:
            rows, length = ops.shape(padding_mask)
            before = ops.ones(
                (rows, ops.shape(positions)[1] - length), padding_mask.dtype
            )
            padding_mask = ops.concatenate([before, padding_mask], axis=1)
        behind = Behind(positions, padding_mask, key, index, token_positions)
        mask = self.causal(behind)
        if spans is not None:
            mask = self._widened(behind, spans, 0 if index is None else index)
        return self.hide(mask, behind, padding_mask, key, attention_mask)

    def _widened(self, behind, spans, index):
        """What is causal but in spans, float32 `(B, 1, T, S)`."""
        # Which token of this call is in a slot, and which span that is of.
        token = behind.read - slots(index, 1)
        inside = ops.logical_and(token >= 0, token < ops.shape(spans)[1])
        of_slot = ops.where(inside, columns(spans, token), 0)
        same = ops.equal(spans[:, :, None], of_slot[:, None, :])
        same = ops.logical_and(same, spans[:, :, None] > 0)
        seen = behind.in_slots >= 0
        if self.window is None:
            return additive(ops.logical_or(seen, same))[:, None]
        near = ops.absolute(behind.in_positions()) < self.window
        if self.window_in_spans:
            seen = ops.logical_and(ops.logical_or(seen, same), near)
        else:
            seen = ops.logical_or(ops.logical_and(seen, near), same)
        return additive(seen)[:, None]

    def compute_output_spec(self, positions, *args, spans=None, **kwargs):
        return super().compute_output_spec(positions, *args, **kwargs)
