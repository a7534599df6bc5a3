"""Where a text that comes in pieces is to end."""


class StopStrings:
    """Shows a growing text up to the first stop string, and not of it.

    The first one is that whose last character comes first. If several end
    there, it is the longest of them, so that none is shown.

    What may be the beginning of a stop string is held back until more of the
    text says that it is not, or that there is no more: the longest end of the
    text that a stop string begins with.

    Args:
        strings: Sequence of strings, none of them empty.

    Attributes:
        found: The stop string that the text ended with, `None` before that.
    """

    def __init__(self, strings):
        self._strings = tuple(strings)
        # Longer ends than that are none of their beginnings.
        self._longest = max(map(len, self._strings), default=1) - 1
        self._held = ""
        self.found = None

    def add(self, piece):
        """Takes a piece of text, and returns what may be shown by now.

        Args:
            piece: str. May be empty.

        Returns:
            str, empty from when a stop string was found.
        """
        if self.found is not None:
            return ""
        text = self._held + piece
        # All that has begun before was held back.
        starts = [(text.find(x), x) for x in self._strings]
        ends = [(at + len(x), at, x) for at, x in starts if at >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        shown = len(text) - self._beginning(text)
        self._held = text[shown:]
        return text[:shown]

    def _beginning(self, text):
        """How many characters at the end of a text a stop string begins with.

        Args:
            text: str that holds no stop string.
        """
        for size in range(min(len(text), self._longest), 0, -1):
            end = text[-size:]
            if any(x.startswith(end) for x in self._strings):
                return size
        return 0

    def rest(self):
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
