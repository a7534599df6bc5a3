"""The task on an encoder and a decoder of Gemma, with upstream's methods."""

from keras import ops

from keras_nlp_cache.generate.seq_2_seq_lm import Seq2SeqLM


class PairedSeq2SeqLM(Seq2SeqLM):
    """Base of tasks whose upstream methods take two caches as a pair.

    They have other arguments than those of other tasks, and their logits may
    have a cap.
    """

    def _logits(self, hidden_states):
        logits = super()._logits(hidden_states)
        cap = self.backbone.final_logit_softcapping
        return logits if cap is None else ops.tanh(logits / cap) * cap

    def call_encoder(self, token_ids, padding_mask):
        """Upstream's method: `(encoder_output, padding_mask)`."""
        return super().call_encoder(token_ids, padding_mask), padding_mask

    def call_decoder_with_cache(
        self,
        decoder_token_ids,
        decoder_padding_mask,
        cache,
        cache_update_index,
        encoder_output,
        encoder_padding_mask,
    ):
        """Upstream's method, with its arguments and its results.

        Args:
            decoder_token_ids: int `(B, T)`.
            decoder_padding_mask: Optional `(B, max_length)`, 0 for padding.
            cache: A pair of what `Seq2SeqLM.call_decoder_with_cache()` takes as
                two arguments. The second is `None` for the decoder to read
                what the encoder returned.
            cache_update_index: int, the slot of the first token.
            encoder_output: `(B, S, hidden_dim)`, from `call_encoder()`.
            encoder_padding_mask: `(B, S)`, 0 for padding.

        Returns:
            `(logits, hidden_states, cache)`.
        """
        text, encoded = cache
        inputs = {"decoder_padding_mask": decoder_padding_mask}
        if encoded is None:
            _, encoded = self._initialize_cache(None, decoder_token_ids)
            inputs |= {
                "encoder_sequence": encoder_output,
                "encoder_padding_mask": encoder_padding_mask,
            }
        logits, hidden_states, cache = self.call_with_cache(
            decoder_token_ids,
            self._joined(text, encoded),
            cache_update_index,
            **inputs,
        )
        return logits, hidden_states, self._split(cache)

    def _build_cache(
        self,
        encoder_token_ids,
        encoder_padding_mask,
        decoder_token_ids,
        decoder_padding_mask,
    ):
        source = self.call_encoder(encoder_token_ids, encoder_padding_mask)
        text, _ = self._initialize_cache(encoder_token_ids, decoder_token_ids)
        _, hidden_states, cache = self.call_decoder_with_cache(
            decoder_token_ids,
            decoder_padding_mask,
            (text, None),
            0,
            *source,
        )
        return hidden_states, cache, source
