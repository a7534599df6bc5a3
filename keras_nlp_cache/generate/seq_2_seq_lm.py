"""The task that generates from what an encoder has read."""

import keras_hub
from keras import ops

from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.generate.many.call import BATCH_SIZE
from keras_nlp_cache.generate.many.requests import Limits
from keras_nlp_cache.generate.prompts import check_count
from keras_nlp_cache.generate.prompts import check_sound
from keras_nlp_cache.generate.reading import check_truncation
from keras_nlp_cache.generate.source_session import SourceSession


class Seq2SeqLM(CausalLM, keras_hub.models.Seq2SeqLM):
    """Base of the tasks that generate from what an encoder has read.

    A drop-in replacement for `keras_hub.models.Seq2SeqLM`. The encoder runs
    once, in the prefill. What decoder blocks read of it is then in the cache,
    with its padding mask, and a decode step is `call_with_cache()` as for any
    other model.

    Args:
        backbone: An `EncoderDecoderBackbone` of this package.
        preprocessor: A `keras_hub.models.Seq2SeqLMPreprocessor`, or `None` to
            pass token ids instead of strings.

    Example:
    ```python
    backbone = BartBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=32,
    )
    lm = BartSeq2SeqLM(backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    prompt = {
        "encoder_token_ids": np.array([[5, 6, 7]]),
        "encoder_padding_mask": np.array([[1, 1, 1]]),
        "decoder_token_ids": np.array([[1, 2, 0, 0, 0, 0]]),
        "decoder_padding_mask": np.array([[1, 1, 0, 0, 0, 0]]),
    }
    lm.generate(prompt, stop_token_ids=None)

    # The first call with a cache has something to read, the others find it
    # there.
    cache = lm.backbone.make_cache(batch_size=1, max_length=8)
    logits, _, cache = lm.call_with_cache(
        [[1, 2]], cache, 0, encoder_token_ids=[[5, 6, 7]]
    )
    logits, _, cache = lm.call_with_cache([[3]], cache, 2)
    ```
    """

    has_encoder = True

    def run_backbone(self, token_ids, cache, cache_update_index, **inputs):
        outputs, cache = super().run_backbone(
            token_ids, cache, cache_update_index, **inputs
        )
        return self.backbone.hidden_states_of(outputs), cache

    # === Upstream's methods ===

    def call_encoder(self, token_ids, padding_mask):
        """Upstream's method: what the encoder returns, `(B, S, hidden_dim)`."""
        return self.backbone.encode(token_ids, padding_mask)

    def call_decoder_with_cache(
        self,
        encoder_hidden_states,
        encoder_padding_mask,
        decoder_token_ids,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
        cross_attention_cache=None,
        cross_attention_cache_update_index=None,
    ):
        """Upstream's method, with its arguments and its results.

        Args:
            encoder_hidden_states: `(B, S, hidden_dim)`, from `call_encoder()`.
            encoder_padding_mask: `(B, S)`, 0 for padding.
            decoder_token_ids: int `(B, T)`.
            self_attention_cache: Tuple of `(key, value)` pairs, one for each
                decoder block, from `_initialize_cache()` or an earlier call.
            self_attention_cache_update_index: int, the slot of the first token.
            cross_attention_cache: Another one.
            cross_attention_cache_update_index: 0 for the decoder to read what
                the encoder returned, or `None` if it has.

        Returns:
            `(logits, hidden_states, self_attention_cache,
            cross_attention_cache)`.
        """
        source = {}
        if cross_attention_cache_update_index is not None:
            source = {
                "encoder_sequence": encoder_hidden_states,
                "encoder_padding_mask": encoder_padding_mask,
            }
        logits, hidden_states, cache = self.call_with_cache(
            decoder_token_ids,
            self._joined(self_attention_cache, cross_attention_cache),
            self_attention_cache_update_index,
            **source,
        )
        return logits, hidden_states, *self._split(cache)

    def _initialize_cache(self, encoder_token_ids, decoder_token_ids):
        batch_size, max_length = ops.shape(decoder_token_ids)
        return self._split(self.backbone.make_cache(batch_size, max_length))

    def _build_cache(
        self, encoder_token_ids, encoder_padding_mask, decoder_token_ids
    ):
        source = self.call_encoder(encoder_token_ids, encoder_padding_mask)
        caches = self._initialize_cache(encoder_token_ids, decoder_token_ids)
        _, hidden_states, *caches = self.call_decoder_with_cache(
            source,
            encoder_padding_mask,
            decoder_token_ids,
            self_attention_cache=caches[0],
            self_attention_cache_update_index=0,
            cross_attention_cache=caches[1],
            cross_attention_cache_update_index=0,
        )
        return hidden_states, source, *caches

    def _split(self, cache):
        """The entries of the text, and those of what the encoder returned."""
        pairs = list(zip(cache, self.backbone.cache_encoded, strict=True))
        return tuple(
            tuple(pair for pair, is_encoded in pairs if is_encoded == wanted)
            for wanted in (False, True)
        )

    def _joined(self, text, encoded):
        """One cache of both."""
        for name, cache in (
            ("self_attention_cache", text),
            ("cross_attention_cache", encoded),
        ):
            if not isinstance(cache, (tuple, list)):
                raise ValueError(
                    f"Expected `{name}` to be a tuple of (key, value) pairs, "
                    "from `_initialize_cache()` or an earlier call. Received: "
                    f"{type(cache).__name__}. One array for all blocks is how "
                    "tasks of keras_hub stack their caches."
                )
        sides = iter(text), iter(encoded)
        return tuple(next(sides[x]) for x in self.backbone.cache_encoded)

    def _has_loop(self):
        return super()._has_loop() and not self.overridden(
            "call_encoder", "call_decoder_with_cache", "_initialize_cache"
        )

    # === Generating ===

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        **further,
    ):
        """Generates text from what the encoder reads, and after a prompt.

        Upstream's method, with its arguments and its results.

        Args:
            inputs: As for `keras_hub.models.Seq2SeqLM.generate()`: strings for
                the encoder, or dictionaries of `encoder_text` and
                `decoder_text`. Without a preprocessor, a dictionary of token
                ids and padding masks.
            max_length: As for `keras_hub.models.Seq2SeqLM.generate()`, of what
                the decoder reads and generates.
            stop_token_ids: As for `CausalLM.generate()`.
            strip_prompt: bool. Whether to leave out how the decoder's text
                began.
            **further: As for `CausalLM.generate()`, but for `assistant_model`
                and `prefix`. With one of these, `inputs` may be any iterable of
                strings or of dictionaries, one for each prompt.

        Raises:
            ValueError: If prompts have no tokens, if there is nothing for the
                encoder to read, if ids are not in the vocabulary, or if a
                further argument is not what it should be.

        Example:
        ```python
        lm.generate(["the fox", "a dog"], max_new_tokens=8, stop_strings=".")
        ```
        """
        if further.get("assistant_model") is not None:
            raise ValueError(
                "Expected no `assistant_model` for a model with an encoder, "
                "since nothing says what the assistant is to read. Received: "
                f"{further['assistant_model']!r}."
            )
        self.check_read(inputs)
        if strip_prompt and further.get("batch_size") is None:
            # Upstream's does not know how.
            further["batch_size"] = BATCH_SIZE
        # Upstream writes into a dictionary. Its preprocessors cut what is too
        # long.
        return super().generate(
            dict(inputs) if isinstance(inputs, dict) else inputs,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            strip_prompt=strip_prompt,
            **{"truncation": "right", **further},
        )

    def check_read(self, inputs):
        """Checks what a preprocessor is to make an encoder's input of.

        Args:
            inputs: A prompt or several, as for `generate()`.
        """
        check_sound(inputs, self.preprocessor)

    def with_rows(self, inputs):
        """Inputs of the backbone, with an axis for rows where one has none.

        Args:
            inputs: Dictionary of a batch of prompts.
        """
        return inputs

    def _generate(self, inputs, stop_token_ids=None):
        if isinstance(inputs, dict):
            inputs = self.with_rows(inputs)
        return super()._generate(inputs, stop_token_ids)

    def stream(
        self,
        prompt,
        max_new_tokens=256,
        stop_token_ids="auto",
        truncation="error",
        **options,
    ):
        """Generates text from what the encoder reads, and yields it.

        Args:
            prompt: What `generate()` takes for one text: a string for the
                encoder, or a dictionary of `encoder_text` and `decoder_text`.
            max_new_tokens: int. Stop after that many tokens.
            stop_token_ids: As for `generate()`.
            truncation: What becomes of a `decoder_text` that leaves no room in
                the positions that the model learned, as for
                `CausalLM.generate()`.
            **options: As for `generate()`, such as `stop_strings`, but for
                `return_logprobs`.

        Returns:
            An iterator with one string for each token, which may be left
            early: the text that has become certain with it, possibly empty.

        Raises:
            ValueError: If the model has no preprocessor, the sampler has a
                loop of its own, or an argument is not what it should be.

        Example:
        ```python
        for piece in lm.stream("the fox", max_new_tokens=8):
            print(piece, end="", flush=True)
        ```
        """
        check_truncation(truncation)
        check_count("max_new_tokens", max_new_tokens)
        limits = Limits(max_new_tokens, None, truncation)
        return SourceSession.after(self, prompt, limits).stream(
            "", max_new_tokens, stop_token_ids, truncation, **options
        )

    def start_session(self, path=None, prompt=None):
        """Starts a text that can be continued turn by turn.

        Args:
            path: A file that `SourceSession.save()` wrote, to go on with.
            prompt: Or what `generate()` takes for one text: a string for the
                encoder, or a dictionary of `encoder_text` and `decoder_text`.
                The encoder reads it once, for all turns.

        Returns:
            A `keras_nlp_cache.generate.source_session.SourceSession`.

        Raises:
            ValueError: If there is not one of the two, the model has no
                preprocessor, the prompt is not what it should be, or the file
                is damaged or of another model.

        Example:
        ```python
        session = lm.start_session(prompt="the quick brown fox")
        session.send("", max_new_tokens=4)
        session.send("and then", max_new_tokens=4)
        ```
        """
        if (path is None) == (prompt is None):
            raise ValueError(
                "Expected `prompt`, what the encoder is to read, or the `path` "
                "of a session that was saved. Received "
                f"{'neither' if path is None else 'both'} of them."
            )
        if path is None:
            return SourceSession.after(self, prompt)
        session = SourceSession(self)
        session.load(path)
        return session

    def chat(self, *args, **kwargs):
        self.refuse_chat("chat()")

    def stream_chat(self, *args, **kwargs):
        self.refuse_chat("stream_chat()")

    def refuse_chat(self, method):
        """Raises a `ValueError`.

        Args:
            method: str. What was called.
        """
        raise ValueError(
            f"Expected a model without an encoder for `{method}`, since a chat "
            "template makes one text of what all sides say, and an encoder and "
            f"a decoder read two. Received: a `{type(self).__name__}`. Call "
            "`start_session(prompt=...)`, and `send()` what the decoder's text "
            "is to go on with."
        )

    def score(self, *args, **kwargs):
        raise ValueError(
            "Expected a model without an encoder for `score()`, which takes "
            "token ids of one text and which keras_hub has for no other model. "
            f"Received: a `{type(self).__name__}`. Call the model on a "
            f"dictionary of {sorted(self.backbone.input)}, for logits, and "
            "look into it with `surgery.tap()`."
        )
