"""The task that generates from images, or sound, and text."""

import contextlib

import numpy as np
from keras import ops
from keras_hub.src.utils.tensor_utils import any_equal

from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.generate import prompts
from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.generate.loops.access import loop_access
from keras_nlp_cache.generate.loops.batch import generate_batch
from keras_nlp_cache.generate.many.image_prompts import are_with_images
from keras_nlp_cache.generate.session_images import SessionImages
from keras_nlp_cache.graph.media_inputs import known


class ImageTextLM(CausalLM):
    """Base of the tasks that generate from images, or sound, and text.

    Images are read in the prefill, once, by one call with all of the tokens
    that see each other, and so are rows of different lengths, one after the
    other. What became of the images is then in the cache, with the text, and a
    decode step is `call_with_cache()` as for any other model.

    Args:
        backbone: An `ImageTextBackbone` of this package.
        preprocessor: What upstream's task takes, or `None` to pass images and
            token ids as its backbone takes them.

    Example:
    ```python
    backbone = PaliGemmaBackbone(
        vocabulary_size=100, image_size=16, num_layers=2, num_query_heads=4,
        num_key_value_heads=1, hidden_dim=32, intermediate_dim=64, head_dim=8,
        vit_patch_size=8, vit_num_heads=2, vit_hidden_dim=16, vit_num_layers=1,
        vit_intermediate_dim=32,
    )
    lm = PaliGemmaCausalLM(backbone=backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    prompt = {
        "images": np.ones((1, 16, 16, 3)),
        "token_ids": np.array([[5, 6, 7, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0]]),
    }
    lm.generate(prompt, stop_token_ids=None)
    ```
    """

    # === Reading ===

    def read_source(self, token_ids, cache, source):
        tokens = token_ids[:, self.backbone.before : self.read_with(source)]
        return self.read(tokens, cache, 0, **source)[1]

    def read_more_source(self, token_ids, cache, source, start):
        shape = ops.shape(token_ids)[0], self.read_with(source)
        tokens = ops.slice(token_ids, start_at(0, start), shape)
        return self.read(tokens, cache, start, **source)[1]

    def read_with(self, source):
        if not source:
            return 0
        name, *_ = self._masks_in(source)
        return self.backbone.before + source[name].shape[1]

    @property
    def names_of_masks(self):
        """Of what is read with images, what has a column for each token."""
        return self.backbone.roles.masks

    def _masks_in(self, source):
        return [name for name in self.names_of_masks if name in source]

    def fitted_source(self, source, length, slots, chunk):
        names = self._masks_in(source)
        needed = max(
            self.needed_with_images(source[name], length) for name in names
        )
        if not needed:
            return {}
        count = -(-needed // chunk) * chunk
        last = count + max(0, -(-(length - 1 - count) // chunk)) * chunk
        if last > slots:
            # Chunks after it would overlap it.
            count = slots
        count -= self.backbone.before
        fitted = dict(source)
        for name in names:
            mask = source[name][:, :count]
            fitted[name] = np.pad(
                mask,
                ((0, 0), (0, count - mask.shape[1])),
                constant_values=self.mask_of_text,
            )
        return fitted

    # What a mask says of tokens that are in no span.
    mask_of_text = 0

    def needed_with_images(self, mask, length):
        """Up to which slot all has to be read with images.

        Args:
            mask: int array `(B, T)`, the last of what is beside a medium.
            length: int. How many slots prompts take.

        Returns:
            int, 0 if there is no image.
        """
        raise NotImplementedError

    # === Generating ===

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        **further,
    ):
        """Generates text after images and prompts.

        Upstream's method, with its arguments and its results.

        Args:
            inputs: As for upstream's task: a dictionary of `images` and
                `prompts`. Without a preprocessor, of what the backbone takes.
                Or prompts alone, as `CausalLM.generate()` takes them, if the
                model reads such.
            max_length: As for upstream's task. Its preprocessor cuts what is
                longer. What then has no room for a whole image is refused.
            stop_token_ids: As for `CausalLM.generate()`.
            strip_prompt: As for upstream's task.
            **further: As for `CausalLM.generate()`. With images, if these
                stand in the text, and `inputs` are `prompts` and `images`.

        Raises:
            ValueError: If images do not fit the prompts, if prompts have no
                tokens or ids that are not in the vocabulary, or if there is a
                further argument with images that does not go with them.
        """
        if isinstance(inputs, dict):
            inputs = dict(inputs)  # Upstream writes into it.
            if "prompts" in inputs:
                # By what is last, upstream sees whether there is one prompt.
                inputs["prompts"] = inputs.pop("prompts")
            goes_further = are_with_images(self, inputs)
            if further and self.backbone.has_towers and not goes_further:
                raise ValueError(
                    "Expected `inputs`, `max_length`, `stop_token_ids` and "
                    "`strip_prompt`, which is what goes with a dictionary of "
                    f"{sorted(inputs)}. Received also: "
                    f"{', '.join(sorted(further))}."
                )
        if self.backbone.has_towers and self.preprocessor is not None:
            texts = isinstance(inputs, (str, list, tuple))
            self.check_media_of({"prompts": inputs} if texts else inputs)
        return super().generate(
            inputs,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            strip_prompt=strip_prompt,
            **further,
        )

    def check_media_of(self, inputs):
        """Checks images and prompts before a preprocessor sees them."""

    def _generate(self, inputs, stop_token_ids=None):
        if self.overridden("generate_step"):
            return super()._generate(inputs, stop_token_ids)
        media = self._media_in(inputs)
        self._check_text_alone(inputs, media)
        if not media:
            return super()._generate(inputs, stop_token_ids)
        stops = prompts.stop_tokens(stop_token_ids)
        prompts.check_tokens(inputs, self.backbone)
        if not self._has_loop():
            self.refuse_states()
        inputs = self._as_arrays({**inputs, **media}, media)
        self._check_media(inputs)
        inputs = self.with_masks(inputs)
        before = 0
        if self._has_loop():
            before = self.backbone.before
            outputs = generate_batch(self, self._in_slots(inputs), stops)
        else:
            outputs = self._in_groups(inputs, stops)
        found = {name: x[:, before:] for name, x in outputs.items()}
        if self.returns_images:
            name = self.backbone.roles.images.given
            found[name] = media[name]
        return found

    # Whether `generate()` returns the images, too, as upstream's does.
    returns_images = True

    def with_masks(self, inputs):
        """A batch of prompts, with all that is read of them with images."""
        return inputs

    def _media_in(self, inputs):
        """What is in a batch of prompts beside text, with its axis.

        Returns:
            Dictionary of what is there of `Roles.media`.
        """
        if not isinstance(inputs, dict) or not self.backbone.has_towers:
            return {}
        found = {}
        for cut in self.backbone.cuts:
            x = inputs.get(cut.medium.given)
            if x is None:
                continue
            if not ops.is_tensor(x):
                x = np.asarray(x)
            if len(x.shape) == len(cut.given.shape) - 1:
                x = x[None]
            if 0 not in x.shape:
                found[cut.medium.given] = x
        return found

    def _check_text_alone(self, inputs, media):
        """Raises a `ValueError` for prompts that lack what is said of them.

        Or that have images, say, for a model without a tower.

        Args:
            inputs: A batch of prompts.
            media: What `_media_in()` finds in it.
        """
        if not isinstance(inputs, dict):
            return
        roles = self.backbone.roles
        for medium in self.backbone.media_roles.media:
            if roles.medium(medium.kind) is not None:
                continue
            shape = getattr(inputs.get(medium.given), "shape", ())
            if shape and 0 not in shape:
                raise ValueError(
                    f"Expected no `{medium.given}` for a backbone without a "
                    f"`{medium.tower}`. Received some of shape {tuple(shape)}."
                )
        if self.backbone.needs_images and not media:
            shape = self.backbone.cuts.images.given.shape[1:]
            raise ValueError(
                f"Expected prompts with `{roles.images.given}` of shape "
                f"{('batch', *shape)}. Received the keys {sorted(inputs)}."
            )
        for medium in roles.media:
            if medium.given in media:
                continue
            for name in medium.beside:
                given = known(inputs.get(name))
                if given is not None and given.any():
                    raise ValueError(
                        f"Expected `{medium.given}` with `{name}`. Received no "
                        f"{medium.noun}s, and `{name}` of shape {given.shape} "
                        "that is not 0 for some tokens."
                    )

    def _as_arrays(self, inputs, media):
        """Prompts as arrays, with what is there beside text, and no more."""
        roles = self.backbone.roles
        absent = [x for x in roles.media if x.given not in media]
        left_out = [name for x in absent for name in (x.given, *x.beside)]
        return {
            name: np.asarray(ops.convert_to_numpy(inputs[name]))
            for name in ("token_ids", "padding_mask", *roles.of_media)
            if inputs.get(name) is not None and name not in left_out
        }

    def _check_media(self, inputs):
        """Has the backbone look at what it is going to read."""
        names = self.backbone.roles.of_media
        media = {name: inputs.get(name) for name in names}
        self.backbone._normalize({"token_ids": inputs["token_ids"], **media})

    def _in_slots(self, inputs):
        """Prompts with a token for each slot that an image takes."""
        width = ((0, 0), (self.backbone.before, 0))
        return {
            **inputs,
            "token_ids": np.pad(inputs["token_ids"], width),
            "padding_mask": np.pad(
                inputs["padding_mask"].astype("int32"), width, constant_values=1
            ),
        }

    # === For sessions ===

    def see(self, text, images):
        if not self.backbone.sees:
            return super().see(text, images)
        if not self.sees_in_turns:
            raise ValueError(
                "Expected no `images` for a session with a "
                f"`{type(self).__name__}`, which reads them at the beginning "
                f"of a text, by `generate()`. Received {len(images)} of them."
            )
        if len(getattr(images, "shape", ())) == 3:
            images = [images]
        shapes = [tuple(getattr(x, "shape", ())) for x in images]
        if any(len(x) != 3 or x[2] != 3 or 0 in x for x in shapes):
            raise ValueError(
                "Expected `images` to be a list of arrays of shape "
                f"`(height, width, 3)`. Received shapes: {shapes}."
            )
        if getattr(self.preprocessor, "image_converter", None) is None:
            raise ValueError(
                "Expected a preprocessor with an `image_converter` for "
                f"`images`. Received {len(images)} of them, and a "
                f"{type(self.preprocessor).__name__} without one."
            )
        images = [np.asarray(ops.convert_to_numpy(x)) for x in images]
        inputs = {"prompts": [text], "images": [images]}
        self.check_media_of(inputs)
        token_ids, x = reading.encode_whole(
            self.preprocessor,
            inputs,
            len(text.encode()) + 3 + self.most_tokens_of(images),
        )
        x = self._as_arrays(x, self._media_in(x))
        places, sizes = (
            found.astype("int32") for found in self.places_in(x, len(images))
        )
        seen = SessionImages(places, None, sizes)
        if (
            len(sizes) != len(images)
            or not seen.are_whole()
            or places[-1] >= len(token_ids) - 1
        ):
            raise ValueError(
                "Expected `text` with the tokens of each image side by side, "
                f"and a token of text after them. Received: {len(images)} "
                f"`images` of {sizes.prod(axis=1).tolist()} tokens, which the "
                f"preprocessor has at {places.tolist()} of the "
                f"{len(token_ids)} tokens that it makes of {text!r}."
            )
        self._check_media(x)
        embeddings = self.generation_loop.evaluate(
            self.embeddings_of, x, len(images)
        )
        return token_ids, seen._replace(embeddings=embeddings)

    def most_tokens_of(self, images):
        """How many tokens a preprocessor makes of images at most.

        If there are more, a text is prepared once more.

        Args:
            images: List of arrays `(height, width, 3)`.
        """
        return 0

    def places_in(self, x, count):
        """Where tokens of images stand in a text.

        Args:
            x: Dictionary of arrays, what a preprocessor makes of one text.
            count: int. How many images it has.

        Returns:
            `(places, sizes)`, as those of `SessionImages`.
        """
        raise NotImplementedError

    def embeddings_of(self, x, count):
        """Runs the tower on the images of one text.

        Takes the arguments of `places_in()`.

        Returns:
            Tensor `(tokens, hidden_dim)`.
        """
        raise NotImplementedError

    def source_in_turn(self, images, token_ids, start):
        """What is read of a text in which images stand, from some token on.

        Args:
            images: `SessionImages`, all of the text.
            token_ids: int32 array `(T,)`, all of the text.
            start: int. How many of these were read before.

        Returns:
            Dictionary as for `read_source()`, for one row.
        """
        raise NotImplementedError

    def _encode(self, medium, inputs):
        """Runs the tower of a medium, on what else it takes, too."""
        names = medium.given, *medium.with_given
        given, *beside = (inputs[name] for name in names)
        return self.backbone.encode(
            medium, given, **dict(zip(medium.with_given, beside))
        )

    # === For samplers with a loop of their own ===

    def _in_groups(self, inputs, stops):
        """Generates for prompts of each length by themselves.

        A step of such a loop is in one slot for all rows, and would read the
        last tokens of longer prompts again, without what follows them.
        """
        lengths = inputs["padding_mask"].astype(bool).sum(axis=1)
        rows = [np.flatnonzero(lengths == x) for x in np.unique(lengths)]
        found = [
            super(ImageTextLM, self)._generate(
                {name: x[group] for name, x in inputs.items()}, stops
            )
            for group in rows
        ]
        order = np.argsort(np.concatenate(rows))
        return {
            name: np.concatenate(
                [ops.convert_to_numpy(x[name]) for x in found]
            )[order]
            for name in ("token_ids", "padding_mask")
        }

    def generate_step(self, inputs, stop_token_ids=None):
        """Upstream's method, for prompts of one length.

        Upstream's calls the tower of its backbone, this one the graph.
        """
        self.refuse_partial_steering()
        self.refuse_states()
        media = self._media_in(inputs)
        self._check_text_alone(inputs, media)
        own = self.overridden("_build_cache", "call_with_cache")
        with contextlib.nullcontext() if own else accessing(loop_access()):
            return self._step_with(inputs, media, stop_token_ids)

    def _step_with(self, inputs, media, stop_token_ids):
        token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
        padding_mask = ops.cast(padding_mask, "bool")
        before = self.backbone.before if media else 0
        seen = {
            x.output: self._encode(x, {**inputs, **media})
            for x in self.backbone.roles.media
            if x.given in media
        }
        hidden_states, cache = self.build_cache_of(inputs, seen)

        def next(prompt, cache, index):
            shape = ops.shape(prompt)[0], 1
            logits, hidden_states, cache = self.call_with_cache(
                ops.slice(prompt, start_at(0, index - 1), shape),
                cache,
                index - 1 + before,
            )
            return logits[:, 0], hidden_states[:, 0], cache

        token_ids = self.sampler(
            next=next,
            prompt=token_ids,
            cache=cache,
            index=ops.min(ops.sum(ops.cast(padding_mask, "int32"), axis=1)),
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        mask = ops.ones_like(padding_mask)
        if stop_token_ids is not None:
            ends = any_equal(
                token_ids, stop_token_ids, ops.logical_not(padding_mask)
            )
            ends = ops.cast(ends, "int32")
            mask = ops.equal(ops.cumsum(ends, axis=1) - ends, 0)
        return {"token_ids": token_ids, "padding_mask": mask}

    def build_cache_of(self, inputs, seen):
        """Calls upstream's `_build_cache()` with what it takes.

        Args:
            inputs: Dictionary of tensors, as for `generate_step()`.
            seen: Dictionary of what towers returned, by its names.
        """
        raise NotImplementedError
