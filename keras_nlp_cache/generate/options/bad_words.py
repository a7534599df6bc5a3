"""What is not to be generated, as token ids and in the logits."""

import numpy as np
from keras import ops

from keras_nlp_cache.generate.options.counting import counts

# The fewest words, and tokens of a word, to make room for. Sizes are powers of
# two, so that other words of similar number compile nothing.
FEWEST_WORDS = 8
FEWEST_TOKENS = 4


def tokenized(words, tokenizer):
    """Token ids in place of strings, spelled with a space before and without.

    Args:
        words: Sequence of strings and of tuples of token ids.
        tokenizer: A `keras_hub.tokenizers.Tokenizer`, or `None`.

    Returns:
        A tuple of tuples of token ids, each once.
    """
    found = []
    for word in words:
        if not isinstance(word, str):
            found.append(word)
            continue
        if tokenizer is None:
            raise ValueError(
                "Expected `bad_words` to be lists of token ids, as the model "
                f"has no `preprocessor`. Received: {word!r}."
            )
        spelled = [_spelled(x, tokenizer) for x in (word, f" {word}")]
        if not any(spelled):
            raise ValueError(
                "Expected each of `bad_words` to have a token at least. "
                f"Received: {word!r}, of which the tokenizer makes none. Leave "
                "it out."
            )
        found += filter(None, spelled)
    return tuple(dict.fromkeys(found))


def _spelled(text, tokenizer):
    return tuple(np.asarray(tokenizer.tokenize(text)).astype(int).tolist())


def shape(words):
    """The shape of their array, `None` if there are no words.

    Raises:
        ValueError: If a word is a string.
    """
    strings = [word for word in words if isinstance(word, str)]
    if strings:
        raise ValueError(
            "Expected `bad_words` that went through `Options.tokenized()`. "
            f"Received: {strings}."
        )
    if not words:
        return None
    return (
        _power_of_two(max(FEWEST_WORDS, len(words))),
        _power_of_two(max(FEWEST_TOKENS, *map(len, words))),
    )


def _power_of_two(size):
    return 1 << (size - 1).bit_length()


def arrays(words):
    """Words as arrays, of which there is one at least.

    Returns:
        A tuple `(token_ids, lengths)`, int32 `(N, L)` and `(N,)`. Words stand
        at the end of their row. What is no word has the length 0.
    """
    token_ids = np.zeros(shape(words), "int32")
    lengths = np.zeros(len(token_ids), "int32")
    for i, word in enumerate(words):
        token_ids[i, -len(word) :] = word
        lengths[i] = len(word)
    return token_ids, lengths


def without_bad_words(logits, words, word_lengths, token_ids, lengths):
    """Leaves out the tokens that would complete a word.

    Args:
        logits: float32 `(B, V)`.
        words: int32 `(N, L)`, as from `arrays()`.
        word_lengths: int32 `(N,)`.
        token_ids: int32 `(B, S)`.
        lengths: int32 `(B,)`.

    Returns:
        float32 `(B, V)`.
    """
    size = words.shape[1] - 1
    steps = ops.arange(size, dtype="int32")
    # What the text of each row ends with, and where it has begun by then.
    positions = lengths[:, None] - size + steps[None]
    ends = ops.take_along_axis(token_ids, ops.maximum(positions, 0), axis=1)
    equal = ops.logical_and(
        ends[:, None] == words[None, :, :-1], positions[:, None] >= 0
    )
    before = size + 1 - word_lengths[:, None]  # Of no word, all of it.
    matches = ops.all(
        ops.logical_or(equal, (steps[None] < before)[None]), axis=2
    )
    matches = ops.logical_and(matches, (word_lengths > 0)[None])
    last = ops.broadcast_to(words[None, :, -1], ops.shape(matches))
    banned = counts(logits, last, matches) > 0
    return ops.where(banned, -float("inf"), logits)
