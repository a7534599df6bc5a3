"""A text is shown up to the first stop string, and no character of it."""

import pytest
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_nlp_cache.generate.options.stop_strings import StopStrings
from keras_nlp_cache.generate.pieces import TextPieces
from tests.families import on_one_backend

pytestmark = on_one_backend("strings are looked for")


def before_the_first(text, strings):
    """What is shown of a text, and the string that it ended with.

    Read character by character: the first string is the one that is complete
    first, the longest of those that are complete at once.
    """
    for end in range(len(text) + 1):
        complete = [x for x in strings if text[:end].endswith(x)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text, sizes):
    """Pieces of a text, as long as some sizes say, with the rest of it."""
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


# Few characters, for strings to begin, to overlap and to be found.
TEXTS = st.text("ab", max_size=24)
STRINGS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
SIZES = st.lists(st.integers(0, 4), max_size=12)


@settings(max_examples=500, deadline=None)
@example("ababac", ["abac"], [3, 1, 1])  # What was held back begins anew.
@example("aabab", ["abab", "ba"], [2])  # One is complete within another.
@example("abb", ["b", "ab"], [1])  # Two are complete at once.
@example("aaa", ["aaaa"], [1, 1])  # One is never complete.
@example("ab", [], [1])
@given(TEXTS, STRINGS, SIZES)
def test_any_cut(text, strings, sizes):
    expected, found = before_the_first(text, strings)
    stop, shown, read = StopStrings(strings), "", ""
    for piece in cut(text, sizes):
        shown, read = shown + stop.add(piece), read + piece
        assert expected.startswith(shown)
        assert stop.found == before_the_first(read, strings)[1]
        if stop.found is None:
            # No more is held back than may be the beginning of one.
            held = read.removeprefix(shown)
            assert not held or any(
                x.startswith(held) and x != held for x in strings
            )
        else:
            assert shown == expected
    assert shown + stop.rest() == expected
    assert stop.found == found
    assert stop.rest() == ""


@pytest.mark.parametrize(
    "strings, pieces, shown",
    [
        (["</s>"], ["a<", "/", "s>b"], ["a", "", ""]),
        (["</s>"], ["a<", "b", "<"], ["a", "<b", ""]),
        (["\n\n", "User:"], ["x\n", "U", "ser:"], ["x", "\n", ""]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["ab", "b"], ["xa", "b"], ["x", ""]),
        (["."], ["a.b.", "c"], ["a", ""]),
        (["long enough", "no"], ["so long", "e", "no"], ["so ", "longe", ""]),
    ],
)
def test_what_each_piece_shows(strings, pieces, shown):
    stop = StopStrings(strings)
    assert [stop.add(x) for x in pieces] == shown


@settings(deadline=None)
@given(
    st.text("aé🙂", max_size=30),
    st.lists(st.text("aé🙂", min_size=1, max_size=3), max_size=2),
    st.integers(1, 5),
)
def test_tokens_that_are_no_whole_characters(text, strings, size):
    """Behind `TextPieces`, wherever tokens end."""
    data = text.encode()
    tokens = [data[i : i + size] for i in range(0, len(data), size)]
    pieces = TextPieces(lambda x: b"".join(x).decode(errors="replace"))
    stop = StopStrings(strings)
    shown = "".join(stop.add(pieces.add(token)) for token in tokens)
    shown += stop.add(pieces.rest()) + stop.rest()
    assert (shown, stop.found) == before_the_first(text, strings)
