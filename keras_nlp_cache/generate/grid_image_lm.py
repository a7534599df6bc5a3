"""The task that generates from images of any size and text.

What is computed of an image depends on its size, so its tower is in no compiled
function. It sees all images of a batch first, once, and what it returns is
embedded with the text. What is then read of a prompt with its images are those
embeddings, each row alone like that of any other prompt.
"""

import numpy as np
from keras import ops

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.graph.image_inputs import known


class GridImageLM(ImageTextLM):
    """Base of tasks that generate from images of any size.

    Args are those of `ImageTextLM`. Of `Roles.beside_images`, the last one says
    which tokens are of images, counted over all rows of a batch.
    """

    returns_images = False

    # === Reading ===

    @property
    def source_names(self):
        roles = self.backbone.roles
        return roles.embeddings, roles.grid_positions, "of_images"

    def read_source(self, token_ids, cache, source):
        tokens = token_ids[:, : self.read_with(source)]
        return self.read(tokens, cache, 0, **source)[1]

    def read_with(self, source):
        if not source:
            return 0
        return source[self.backbone.roles.embeddings].shape[1]

    def fitted_source(self, source, length, slots, chunk):
        source = dict(source)
        inside = source.pop("of_images", np.zeros((1, 0), bool)).any(axis=0)
        needed = np.flatnonzero(inside).max(initial=-1) + 1
        if not needed:
            return {}
        count = min(-(-needed // chunk) * chunk, slots)
        roles = self.backbone.roles
        for name, axis in ((roles.embeddings, 1), (roles.grid_positions, 2)):
            if name in source:
                source[name] = _of_length(source[name], count, axis)
        # What comes after it in a chunk changes no state, and neither does the
        # last token, which the first step reads.
        rows = len(source[roles.embeddings])
        mask = np.arange(slots) < min(count, length - 1)
        mask = np.broadcast_to(mask.astype("int32"), (rows, slots))
        return {**source, roles.padding_mask: mask}

    # === Generating ===

    def with_masks(self, inputs):
        roles = self.backbone.roles
        text = roles.token_ids, roles.padding_mask
        *_, places = roles.beside_images
        of_images = np.zeros(inputs[text[0]].shape, bool)
        of_images.flat[inputs[places].reshape(-1)] = True
        _check_within_prompts(of_images, inputs[roles.padding_mask])
        images = {name: inputs.get(name) for name in roles.of_images}
        embeddings = self.generation_loop.evaluate(
            self.backbone.embed, {text[0]: inputs[text[0]], **images}
        )
        found = {
            **{name: inputs[name] for name in text},
            roles.embeddings: ops.convert_to_numpy(
                ops.cast(embeddings, "float32")
            ),
            "of_images": of_images,
        }
        if roles.grid_positions in inputs:
            found[roles.grid_positions] = inputs[roles.grid_positions]
        return found

    def _check_text_alone(self, inputs):
        super()._check_text_alone(inputs)
        name = self.backbone.roles.grid_positions
        given = known(inputs.get(name)) if isinstance(inputs, dict) else None
        if given is not None and (given != np.arange(given.shape[-1])).any():
            raise ValueError(
                f"Expected `{name}` of a text without images to count its "
                f"tokens. Received: {given.tolist()}."
            )

    def fitted(self, inputs, max_length, truncation):
        roles = self.backbone.roles
        if not isinstance(inputs, dict) or self._images_in(inputs) is None:
            return super().fitted(inputs, max_length, truncation)
        *_, places = roles.beside_images
        before = np.shape(inputs[roles.token_ids])[-1]
        inputs = reading.fitted(inputs, max_length, truncation, [places])
        found = np.asarray(ops.convert_to_numpy(inputs[places]))
        inputs[places] = found // before * max_length + found % before
        if inputs.get(roles.grid_positions) is not None:
            inputs[roles.grid_positions] = _of_length(
                ops.convert_to_numpy(inputs[roles.grid_positions]),
                max_length,
                axis=2,
            )
        return inputs


def _check_within_prompts(of_images, padding_mask):
    """Checks that a token of text follows each image of a prompt."""
    last = padding_mask.astype(bool).sum(axis=1) - 1
    after = np.arange(of_images.shape[1]) >= last[:, None]
    rows = np.flatnonzero((of_images & after).any(axis=1))
    if len(rows):
        raise ValueError(
            "Expected prompts to end with a token of text, after their images. "
            f"Received: prompt {rows[0]} of {last[rows[0]] + 1} tokens, with "
            f"tokens of images up to {np.flatnonzero(of_images[rows[0]])[-1]}."
        )


def _of_length(x, count, axis):
    """An array with so many entries along an axis, the last ones 0."""
    missing = max(0, count - x.shape[axis])
    width = [(0, 0)] * x.ndim
    width[axis] = 0, missing
    return np.take(np.pad(x, width), np.arange(count), axis=axis)
