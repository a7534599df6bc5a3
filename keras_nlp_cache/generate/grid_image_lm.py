"""The task that generates from images of any size and text.

What is computed of an image depends on its size, so its tower is in no compiled
function. It sees all images of a batch first, once, and what it returns is
embedded with the text. What is then read of a prompt with its images are those
embeddings, each row alone like that of any other prompt.
"""

import numpy as np
from keras import ops

from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.cache.source_inputs import JoinedEmbeddings
from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.image_text_lm import ImageTextLM
from keras_nlp_cache.graph.media_inputs import known


class GridImageLM(ImageTextLM):
    """Base of tasks that generate from images of any size.

    Args are those of `ImageTextLM`. Of what is beside images, the last one says
    which tokens are of images, counted over all rows of a batch.
    """

    returns_images = False

    # === Reading ===

    @property
    def source_names(self):
        roles = self.backbone.roles
        return roles.embeddings, roles.grid_positions, "of_images"

    def read_source(self, token_ids, cache, source):
        return self.read_more_source(token_ids, cache, source, 0)

    def read_more_source(self, token_ids, cache, source, start):
        rows, slots = ops.shape(token_ids)
        at, name = start_at(0, start), self.backbone.roles.padding_mask
        tokens = ops.slice(token_ids, at, (rows, self.read_with(source)))
        # What is read is told of all slots.
        mask = ops.slice_update(
            ops.ones((rows, slots), "int32"), at, source[name]
        )
        return self.read(tokens, cache, start, **{**source, name: mask})[1]

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
        mask = (np.arange(count) < length - 1).astype("int32")
        return {**source, roles.padding_mask: np.tile(mask, (rows, 1))}

    # === Generating ===

    def with_masks(self, inputs):
        roles = self.backbone.roles
        text = roles.token_ids, roles.padding_mask
        *_, places = roles.images.beside
        of_images = np.zeros(inputs[text[0]].shape, bool)
        of_images.flat[inputs[places].reshape(-1)] = True
        _check_within_prompts(of_images, inputs[roles.padding_mask])
        images = {name: inputs.get(name) for name in roles.of_media}
        found = {
            **{name: inputs[name] for name in text},
            **self._embedded({text[0]: inputs[text[0]], **images}),
            "of_images": of_images,
        }
        if roles.grid_positions in inputs:
            found[roles.grid_positions] = inputs[roles.grid_positions]
        return found

    def _embedded(self, inputs):
        """Images and text as one sequence, as a dictionary of an array."""
        embeddings = self.generation_loop.evaluate(self.backbone.embed, inputs)
        embeddings = ops.convert_to_numpy(ops.cast(embeddings, "float32"))
        return {self.backbone.roles.embeddings: embeddings}

    def _check_text_alone(self, inputs, media):
        super()._check_text_alone(inputs, media)
        if media:
            return
        name = self.backbone.roles.grid_positions
        given = known(inputs.get(name)) if isinstance(inputs, dict) else None
        if given is not None and (given != np.arange(given.shape[-1])).any():
            raise ValueError(
                f"Expected `{name}` of a text without images to count its "
                f"tokens. Received: {given.tolist()}."
            )

    def fitted(self, inputs, max_length, truncation):
        roles = self.backbone.roles
        if not isinstance(inputs, dict) or not self._media_in(inputs):
            return super().fitted(inputs, max_length, truncation)
        *_, places = roles.images.beside
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

    @property
    def embeddings_layer(self):
        if not self.backbone.sees:
            return super().embeddings_layer
        # As for upstream's `score()`, those of images are among them.
        (node,) = self.backbone.nodes_of_kind(JoinedEmbeddings)
        return node.operation

    # === For sessions ===

    sees_in_turns = True

    def places_in(self, x, count):
        grid, places = (x[name] for name in self.backbone.roles.images.beside)
        merged = self.backbone.vision_encoder.spatial_merge_size
        return np.sort(places.reshape(-1)), grid.reshape(-1, 3)[:, 1:] // merged

    def embeddings_of(self, x, count):
        roles = self.backbone.roles
        seen = self._encode(roles.images, x)
        return ops.reshape(seen, (-1, seen.shape[-1]))

    def source_in_turn(self, images, token_ids, start):
        roles, new = self.backbone.roles, images.since(start)
        *_, name_of_places = roles.images.beside
        token_ids = token_ids[None]
        of_images = np.zeros(token_ids[:, start:].shape, bool)
        of_images[0, new.places] = True
        found = self._embedded(
            {
                roles.token_ids: token_ids[:, start:],
                roles.images.output: new.embeddings[None],
                name_of_places: new.places[None],
            }
        )
        if roles.grid_positions is not None:
            positions = images.grid_positions(token_ids.shape[1])
            found[roles.grid_positions] = positions[None, :, start:]
        return {**found, "of_images": of_images}


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
