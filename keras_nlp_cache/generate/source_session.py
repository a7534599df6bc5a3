"""A text that grows turn by turn, after what an encoder has read once."""

import numpy as np

from keras_nlp_cache.generate.many.answering import padded_sources
from keras_nlp_cache.generate.many.requests import Limits
from keras_nlp_cache.generate.many.source_prompts import SourcePrompts
from keras_nlp_cache.generate.session import Session
from keras_nlp_cache.generate.session_images import SessionImages


class SourceSession(Session):
    """A text that a decoder goes on with, after what its encoder has read.

    `Seq2SeqLM.start_session()` makes one. The encoder reads one thing, once,
    when the decoder first generates. What `send()` adds is the decoder's text,
    and a turn costs no more than what is new in it. To have something else
    read, start another session.

    The text begins with the tokens that the preprocessor begins it with, and
    the `decoder_text` of the prompt if there is one. All but the first of these
    can be rewound. `send("")` goes on with what there is.

    There is no `chat()`: a chat template writes what all sides say as one text,
    and here the encoder reads one text and the decoder another.

    Args:
        lm: A `Seq2SeqLM` with a preprocessor, compiled with a sampler that
            picks one token at a time. The session has to be given something to
            read, by `after()` or by `load()`.

    Example:
    ```python
    session = lm.start_session(prompt="the quick brown fox")
    session.send("", max_new_tokens=4)
    other = session.fork()
    session.send("and then", max_new_tokens=4)
    other.rewind(2)
    other.save("fox.safetensors")
    ```
    """

    fewest_tokens = 1

    @classmethod
    def after(cls, lm, prompt, limits=None):
        """Begins a session with a prompt of a user's.

        Args:
            lm: As for the class.
            prompt: What the `generate()` of the model takes for one text.
            limits: Optional `Limits`, what the text is to have room for. By
                default, for one token more.

        Raises:
            ValueError: If the model has no preprocessor, or the prompt is not
                what it should be.
        """
        session = cls(lm)
        prompts = SourcePrompts(lm, limits or Limits(max_new_tokens=1))
        requests = list(prompts.requests([prompt]))
        (request,) = padded_sources(requests, lm.backbone.roles)
        session._source = {name: x[None] for name, x in request.source.items()}
        session.token_ids = request.token_ids
        return session

    def _empty(self):
        session = SourceSession(self.lm)
        session._source = self._source
        return session

    def stream_chat(self, *args, **kwargs):
        """Refuses to: see above."""
        self.lm.refuse_chat("stream_chat()")

    def chat(self, *args, **kwargs):
        """Refuses to: see above."""
        self.lm.refuse_chat("chat()")

    def _tokenize(self, text, images):
        if not isinstance(text, str):
            raise ValueError(
                f"Expected `text` to be a string. Received: {text!r}."
            )
        if images is not None and len(images):
            raise ValueError(
                "Expected no `images` in the text of a decoder, whose encoder "
                f"has read what there is to read. Received {len(images)}."
            )
        tokens = np.zeros((0,), "int32")
        if text:
            tokenizer = self.lm.preprocessor.tokenizer
            tokens = np.asarray(tokenizer.tokenize(text), "int32")
        return tokens, 0, SessionImages()
