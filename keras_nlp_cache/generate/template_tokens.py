"""How the text that a chat template makes becomes tokens.

A template spells special tokens out, and so may a user. What users wrote is
marked where it spells one, so that it is read letter by letter.
"""

import dataclasses
import functools
import re

import keras_hub
import numpy as np
from keras import ops

# No character, and so in no text. Where it stands, a special token ends that
# is none.
MARK = "\ufdd0"
# Whose words are not those of whoever wrote the program.
_TRUSTED = ("system", "developer")
# Attributes of tokenizers.
_CONTROL = ("start_token", "end_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class Span:
    """Some text of a conversation, and its tokens.

    Attributes:
        text: str, with marks.
        token_ids: Tuple of ints.
        is_closed: bool. Whether whatever follows, the tokens are the same.
    """

    text: str
    token_ids: tuple
    is_closed: bool


class TemplateTokens:
    """Reads what a chat template makes with a tokenizer.

    Upstream's tokenizers do not all find special tokens in text, and some add
    a space to each that they are given. So the text is cut at special tokens.

    Args:
        tokenizer: A tokenizer of keras_hub.
        template: A `ChatTemplate`.
        turn_end_id: Optional int, a token that ends an answer, beside those
            that the tokenizer and the template name.
    """

    def __init__(self, tokenizer, template, turn_end_id=None):
        self.tokenizer, self.template = tokenizer, template
        self._turn_end_id = turn_end_id
        self._special = _special_tokens(tokenizer, template)
        longest_first = sorted(self._special, key=len, reverse=True)
        # Nothing matches where there are none.
        self._pattern = re.compile(
            "|".join(map(re.escape, longest_first)) or r"(?!)"
        )

    @functools.cached_property
    def control_ids(self):
        """Ids of tokens that are no text, wherever they are generated."""
        names = [getattr(self.tokenizer, x, None) for x in _CONTROL]
        ids = {self._special[x] for x in names if x in self._special}
        return ids.union(self.stop_ids)

    @functools.cached_property
    def stop_ids(self):
        """Ids of the tokens that an answer ends with, as a tuple."""
        end = getattr(self.tokenizer, "end_token_id", None)
        ids = (end, self._turn_end_id, self._end_in_template())
        return tuple(sorted({int(x) for x in ids if x is not None}))

    def _end_in_template(self):
        """The id of what the template writes after an answer, or `None`."""
        answer = "answer"
        messages = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": answer},
        ]
        try:
            text = self.template.render(messages, add_generation_prompt=False)
        except ValueError:
            return None
        _, _, end = text.rpartition(answer)
        found = self._pattern.match(end.lstrip())
        return self._special[found.group()] if found else None

    def render(self, messages, add_generation_prompt=True, **variables):
        """The text of a conversation, with marks in what users spelled out."""
        marked = [
            {**message, "content": self._marked(**message)}
            for message in messages
        ]
        return self.template.render(
            marked, add_generation_prompt=add_generation_prompt, **variables
        )

    def _marked(self, role, content, **_):
        content = content.replace(MARK, "")
        if role in _TRUSTED:
            return content

        def mark(found):
            token = found.group()
            if role == "assistant":
                # Models think and call tools in tokens of their own.
                if self._special[token] not in self.stop_ids:
                    return token
            return f"{token[0]}{MARK}{token[1:]}"

        # What is left of a token may spell another.
        while (marked := self._pattern.sub(mark, content)) != content:
            content = marked
        return content

    def begins_special(self, text, start):
        """Whether a text goes on with a special token, or ends."""
        return (
            start == len(text) or self._pattern.match(text, start) is not None
        )

    def read(self, text, before=None):
        """The tokens of a text.

        Args:
            text: str, as `render()` returns it, or the end of such.
            before: Optional int, the id of the token before the text.

        Returns:
            A list of `Span`s.
        """
        spans, end = [], 0
        for found in self._pattern.finditer(text):
            spans.append(self._plain(text[end : found.start()], before))
            before, end = self._special[found.group()], found.end()
            spans.append(Span(found.group(), (before,), is_closed=True))
        spans.append(self._plain(text[end:], before))
        return [span for span in spans if span.text]

    def _plain(self, text, before):
        starts = before is None or before == getattr(
            self.tokenizer, "start_token_id", None
        )
        ids = []
        for i, part in enumerate(text.split(MARK)):
            if part:
                whole = self.tokenizer if starts and i == 0 else self._middle
                ids += _ids(whole(part))
        return Span(text, tuple(ids), is_closed=False)

    @functools.cached_property
    def _middle(self):
        """The tokenizer for what is not at the start of a text."""
        tokenizer = self.tokenizer
        if getattr(tokenizer, "add_prefix_space", False):
            return keras_hub.tokenizers.BytePairTokenizer(
                tokenizer.vocabulary,
                tokenizer.merges,
                unsplittable_tokens=tokenizer.unsplittable_tokens,
            )
        if isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
            proto = _proto(tokenizer)
            if proto.normalizer_spec.add_dummy_prefix:
                import sentencepiece

                proto.normalizer_spec.add_dummy_prefix = False
                proto.normalizer_spec.remove_extra_whitespaces = False
                return sentencepiece.SentencePieceProcessor(
                    model_proto=proto.SerializeToString()
                ).encode
        return tokenizer


def _ids(tokens):
    return [int(x) for x in np.ravel(ops.convert_to_numpy(tokens))]


def _special_tokens(tokenizer, template):
    """Tokens that are no words, from their text to their ids."""
    tokens = set(tokenizer.special_tokens)
    # Those of byte-pair tokenizers, whatever they are called.
    tokens.update(getattr(tokenizer, "unsplittable_tokens", None) or ())
    if isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        pieces = _proto(tokenizer).pieces
        for piece in pieces:
            if piece.type == piece.CONTROL:
                tokens.add(piece.piece)
            elif piece.type == piece.USER_DEFINED:
                # Some of these are words, or spaces.
                if piece.piece.strip() and piece.piece in template.source:
                    tokens.add(piece.piece)
    return {
        token: int(tokenizer.token_to_id(token))
        for token in tokens.intersection(tokenizer.get_vocabulary())
        # A letter alone could not be told from text.
        if len(token.strip()) > 1
    }


def _proto(tokenizer):
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
