"""Looks at texts while they grow."""

from keras_nlp_cache.generate.options.stop_strings import StopStrings
from keras_nlp_cache.generate.pieces import TextPieces


class Watch:
    """Looks for stop strings in texts while they grow.

    Args:
        lm: A `CausalLM` with a preprocessor.
        strings: Sequence of strings.
    """

    def __init__(self, lm, strings):
        self._detokenize = lm.preprocessor.tokenizer.detokenize
        self._strings, self._texts = strings, {}

    def __call__(self, number, token_ids, given):
        """See `Places`."""
        if number not in self._texts:
            self._texts[number] = (
                TextPieces(self._detokenize),
                StopStrings(self._strings),
                [given, ""],
            )
        pieces, stop, seen = self._texts[number]
        for token_id in token_ids[seen[0] :]:
            seen[0] += 1
            seen[1] += stop.add(pieces.add(int(token_id)))
            if stop.found is not None:
                return seen[0]
        return None

    def text(self, number):
        """What was generated before a stop string, `None` if there is none."""
        if number not in self._texts:
            return None
        _, stop, (_, text) = self._texts.pop(number)
        return text if stop.found is not None else None
