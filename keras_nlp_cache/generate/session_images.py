"""The images of a session: where they stand, and what became of them."""

import typing

import numpy as np
from keras import ops


class SessionImages(typing.NamedTuple):
    """Images in the text of a session, as a tower saw them.

    So each is seen once, however often the text is read again.

    Attributes:
        places: int32 array `(N * tokens,)`, which tokens of the text are of
            images, in ascending order.
        embeddings: Tensor `(N, tokens, hidden_dim)`, what
            `ImageTextBackbone.encode_images()` made of them, in a row. `None`
            if there are none.
    """

    places: np.ndarray = np.zeros((0,), "int32")
    embeddings: typing.Any = None

    def __bool__(self):
        return self.embeddings is not None

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
            return SessionImages(places, new.embeddings)
        return SessionImages(
            places, ops.concatenate([self.embeddings, new.embeddings])
        )

    def before(self, count):
        """Those among the first `count` tokens."""
        return self._those(self.places < count)

    def source(self, start, length, backbone):
        """What a backbone takes to read those from some token on.

        Args:
            start: int. Where the call begins.
            length: int. How many tokens the text has.
            backbone: The backbone.

        Returns:
            Dictionary for one row, with places counted from `start`. `None` if
            there is no image.
        """
        found = self._those(self.places >= start)
        if not found:
            return None
        places = found.places - start
        mask = np.zeros((1, length - start), "int32")
        mask[0, places] = 1
        roles, embeddings = backbone.roles, found.embeddings
        *_, name_of_places, name_of_mask = roles.beside_images
        if len(backbone.cuts.tower.shape) == 4:
            embeddings = embeddings[None]
        return {
            roles.image_embeddings: embeddings,
            name_of_places: places[None].astype("int32"),
            name_of_mask: mask,
        }

    def check_end(self, count, received):
        """Checks that a text may end after some tokens.

        Its last token is read once more, and is to be none of an image.

        Args:
            count: int. How many tokens are left.
            received: str. What a user said that leaves as many.

        Raises:
            ValueError: If an image would be left in part, or nothing after it.
        """
        if not count or count - 1 not in self.places:
            return
        tokens = self.embeddings.shape[1]
        image = int(np.searchsorted(self.places, count - 1)) // tokens
        first = int(self.places[image * tokens])
        raise ValueError(
            "Expected to be left with a token of text at the end, after whole "
            f"images. Received: {received}, after which the last of {count} "
            f"tokens is one of the image at {first} to {first + tokens - 1}. "
            f"Leave {first} tokens, or {first + tokens + 1} or more."
        )

    def _those(self, chosen):
        if not chosen.any():
            return SessionImages()
        tokens = self.embeddings.shape[1]
        images = np.flatnonzero(chosen)[::tokens] // tokens
        first, last = int(images[0]), int(images[-1])
        return SessionImages(
            self.places[chosen], self.embeddings[first : last + 1]
        )
