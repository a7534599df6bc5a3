"""The images of a session: where they stand, and what became of them."""

import typing

import numpy as np
from keras import ops


class SessionImages(typing.NamedTuple):
    """Images in the text of a session, as a tower saw them.

    So each is seen once, however often the text is read again.

    Attributes:
        places: int32 array `(tokens,)`, which tokens of the text are of images,
            in ascending order. Those of one image stand side by side.
        embeddings: Tensor `(tokens, hidden_dim)`, what
            `ImageTextBackbone.encode_images()` made of them. `None` if there
            are none.
        sizes: int32 array `(N, 2)`, how many rows and columns of tokens each
            image has. Those that are in no grid are one row.
    """

    places: np.ndarray = np.zeros((0,), "int32")
    embeddings: typing.Any = None
    sizes: np.ndarray = np.zeros((0, 2), "int32")

    def __bool__(self):
        return self.embeddings is not None

    @property
    def spans(self):
        """Arrays `(N, 2)`: the first token of each image, and the next."""
        counts = self.sizes.prod(axis=1)
        first = self.places[np.cumsum(counts) - counts]
        return np.stack([first, first + counts], axis=1)

    def are_whole(self):
        """Whether there are as many tokens of images as sizes say, in order."""
        count = self.sizes.prod(axis=1).sum()
        if (self.sizes < 1).any() or count != len(self.places):
            return False
        found = [x for span in self.spans for x in range(*span)]
        ascending = (np.diff(self.places) > 0).all()
        return ascending and found == self.places.tolist()

    def added(self, new, start):
        """These and others.

        Args:
            new: `SessionImages` of a text that follows this one.
            start: int. Where that begins.
        """
        if not new:
            return self
        places = np.append(self.places, new.places + start).astype("int32")
        if not self:
            return new._replace(places=places)
        return SessionImages(
            places,
            ops.concatenate([self.embeddings, new.embeddings]),
            np.concatenate([self.sizes, new.sizes]),
        )

    def before(self, count):
        """Those among the first `count` tokens."""
        return self._those(slice(np.searchsorted(self.places, count)))

    def since(self, start):
        """Those among the tokens from some on, with places counted from it."""
        found = self._those(slice(np.searchsorted(self.places, start), None))
        return found._replace(places=found.places - np.int32(start))

    def grid_positions(self, length):
        """Where the tokens of a text stand if those of images are in grids.

        Text goes on after an image where its longer side ends.

        Args:
            length: int. How many tokens the text has.

        Returns:
            int32 array `(4, length)`, as `GridPositions` takes it.
        """
        found = np.tile(np.arange(length, dtype="int32"), (4, 1))
        for (first, end), size in zip(self.spans, self.sizes):
            found[:, first:end] = found[0, first]
            found[2:, first:end] += np.indices(size).reshape(2, -1)
            found[:, end:] += size.max() - size.prod()
        return found

    def check_end(self, count, received):
        """Checks that a text may end after some tokens.

        Its last token is read once more, and is to be none of an image.

        Args:
            count: int. How many tokens are left.
            received: str. What a user said that leaves as many.

        Raises:
            ValueError: If an image would be left in part, or nothing after it.
        """
        for first, end in self.spans:
            if first < count <= end:
                raise ValueError(
                    "Expected to be left with a token of text at the end, "
                    f"after whole images. Received: {received}, after which "
                    f"the last of {count} tokens is one of the image at "
                    f"{first} to {end - 1}. Leave {first} tokens, or {end + 1} "
                    "or more."
                )

    def _those(self, chosen):
        """The images that have the tokens of a slice of all, whole ones."""
        if not len(self.places[chosen]):
            return SessionImages()
        ends = np.cumsum(self.sizes.prod(axis=1))
        first, end, _ = chosen.indices(len(self.places))
        images = slice(*np.searchsorted(ends, [first, end - 1], side="right"))
        return SessionImages(
            self.places[chosen],
            self.embeddings[first:end],
            self.sizes[images.start : images.stop + 1],
        )
