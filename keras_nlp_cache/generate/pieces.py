"""Text from tokens that come one at a time."""

from keras_nlp_cache.generate.options.stop_strings import StopStrings

# What `detokenize()` puts in place of bytes that are not yet a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextPieces:
    """Cuts a growing text into pieces of whole characters.

    How a token reads may depend on those before it: a byte completes a
    character, a space is dropped at the start of a text. So tokens are turned
    into text together with some before them, and never all of them again.

    Args:
        detokenize: Function from a list of token ids to a string.
    """

    # Long enough for any character, and for a tokenizer's idea of a start.
    context = 8
    longest = 32

    def __init__(self, detokenize):
        self._detokenize = detokenize
        self._window, self._shown = [], ""

    def add(self, token_id):
        """Takes a token, and returns the text that is certain by now."""
        self._window.append(token_id)
        text = self._certain(self._window)
        piece = text[len(self._shown) :]
        self._shown = text
        if len(self._window) > self.longest:
            window = self._window[-self.context :]
            # Bytes without a whole character among them say nothing.
            if shown := self._certain(window):
                self._window, self._shown = window, shown
        return piece

    def _certain(self, window):
        """The text of some tokens, without what the next may complete."""
        return self._detokenize(window).rstrip(_INCOMPLETE)

    def rest(self):
        """What is left when no more tokens come, complete or not."""
        if not self._window:
            return ""
        return self._detokenize(self._window)[len(self._shown) :]


def pieces_of(tokens, detokenize, stop_token_ids, stop_strings):
    """Yields text for each token, up to where it is to end.

    Args:
        tokens: Iterator of token ids. It is not asked for more after the end.
        detokenize: As for `TextPieces`.
        stop_token_ids: Collection of ints. A text ends before one of them.
        stop_strings: As for `StopStrings`.
    """
    pieces, until = TextPieces(detokenize), StopStrings(stop_strings)
    for token_id in tokens:
        if token_id in stop_token_ids:
            break
        yield until.add(pieces.add(token_id))
        if until.found is not None:
            return
    rest = until.add(pieces.rest()) + until.rest()
    if rest:
        yield rest
