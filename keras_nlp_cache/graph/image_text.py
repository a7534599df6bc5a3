"""A backbone that reads images with its text, or sound.

What an image becomes stands in the text, as if there were tokens for it: before
all others, or in the place of some. So a cache has slots for it like any other,
and where images are read once, nothing of them is needed any more. What is
different is the call that reads them: some of its tokens see what follows them
(`cache/spans.py`), so it has to have all of these, and the graph can be given
what was computed of images before (`media_wiring.py`).

All that is told of images is so of any `Medium`, each with a tower of its own.
"""

import typing

import keras

from keras_nlp_cache.cache.source_inputs import EncoderOutput
from keras_nlp_cache.cache.source_inputs import JoinedEmbeddings
from keras_nlp_cache.cache.spans import ImageSpans
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.constructed import nodes_of
from keras_nlp_cache.graph.grid_wiring import GridWiring
from keras_nlp_cache.graph.inputs import normalize
from keras_nlp_cache.graph.media_inputs import normalize_media
from keras_nlp_cache.graph.media_wiring import MediaWiring
from keras_nlp_cache.graph.media_wiring import name_of_joined
from keras_nlp_cache.graph.media_wiring import name_of_output
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import TEXT
from keras_nlp_cache.quantization.quantizing import floating_policy


class Cut(typing.NamedTuple):
    """Symbolic tensors of upstream's graph, at which ours is cut for a medium.

    Args:
        medium: `Medium`.
        given: What goes into the tower.
        tower: What comes out of it.
        joined: That and the text as one sequence.
    """

    medium: Medium
    given: typing.Any
    tower: typing.Any
    joined: typing.Any


class Cuts(tuple):
    """A `Cut` for each medium, in the order in which they join the text."""

    @property
    def joined(self):
        """All media and the text as one sequence."""
        return self[-1].joined

    @property
    def embeddings(self):
        """What can be given there, of texts of any length."""
        x = self.joined
        return keras.KerasTensor((x.shape[0], None, x.shape[-1]), x.dtype)

    @property
    def images(self):
        """The `Cut` for images, `None` if there is no tower for them."""
        return next((x for x in self if x.medium.kind == "image"), None)


class ImageTextBackbone(CachedBackbone):
    """Base of backbones whose graph reads images, or sound.

    Four calls are possible, by what is passed beside `"token_ids"`:

    - with `"images"`, all of the graph runs,
    - with `"img_embeddings"` in their place, all but the tower that sees them,
    - with `"embeddings"`, only what comes after images and text are embedded,
    - with none of these, what is read is text.

    Images are read by one call, with all of the tokens that see each other. All
    later ones find in the cache what became of them.

    Sound is read like images. There are as many towers as `Roles.media` has
    media, and each of these is there or not.

    Attributes:
        media_roles: `Roles` of a model with all towers.
        text_roles: `Roles` of one without any.
        windows_in_spans: bool. Whether a window holds among tokens that see
            each other, too.
        before: int. How many slots an image takes before those of the text.
        needs_images: bool. Whether no text stands alone.

    Call arguments:
        inputs: A dictionary. Beyond what `CachedBackbone` takes, what
            upstream's backbone does with images, and in their place:

            - `"img_embeddings"`: what `encode_images()` returns.
            - `"embeddings"`: `(B, T, hidden_dim)`, what `embed()` returns.

    Example:
    ```python
    backbone = PaliGemmaBackbone(
        vocabulary_size=100, image_size=16, num_layers=2, num_query_heads=4,
        num_key_value_heads=1, hidden_dim=32, intermediate_dim=64, head_dim=8,
        vit_patch_size=8, vit_num_heads=2, vit_hidden_dim=16, vit_num_layers=1,
        vit_intermediate_dim=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=16)
    _, cache = backbone({
        "images": np.ones((1, 16, 16, 3)),
        "token_ids": [[5, 6, 7]],
        "cache": cache,
        "cache_update_index": 0,
    })
    hidden_states, cache = backbone({
        "token_ids": [[8]],
        "cache": cache,
        "cache_update_index": backbone.before + 3,
    })
    ```
    """

    media_roles = text_roles = TEXT
    windows_in_spans = True
    before = 0
    needs_images = False
    _roles = TEXT

    @property
    def roles(self):
        """What inputs are called. A model without a tower reads text."""
        return self._roles

    @property
    def has_towers(self):
        """Whether something else than text is read."""
        return bool(self.roles.media)

    @property
    def sees(self):
        """Whether there is a tower of images."""
        return self.roles.medium("image") is not None

    def towers(self, medium):
        """The layers that make of a medium what the text is joined with."""
        names = medium.tower, *medium.after_tower
        return [getattr(self, name) for name in names]

    @property
    def prefill_layers(self):
        """The layers that no decode step calls."""
        if not self.has_towers:
            return getattr(super(), "prefill_layers", [])
        return [
            x
            for medium in self.roles.media
            for tower in self.towers(medium)
            for x in tower._flatten_layers()
        ]

    # === How the graph is made ===

    def __init__(self, inputs, outputs, **kwargs):
        self._roles = self.roles_as_constructed()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def roles_as_constructed(self):
        """`Roles` of upstream's graph, by what it was constructed with."""
        roles = self.media_roles
        media = [x for x in roles.media if getattr(self, x.tower) is not None]
        if not media:
            return self.text_roles
        return roles._replace(media=tuple(media))

    def _output_of_encoder(self, outputs):
        if not self.has_towers:
            return super()._output_of_encoder(outputs)
        nodes = nodes_of(outputs)
        return Cuts(self._cut(x, nodes) for x in self.roles.media)

    def _cut(self, medium, nodes):
        towers = [nodes[x][0] for x in self.towers(medium)]
        read = towers[0].input_tensors
        if medium.join is None:
            joined = nodes[self.blocks[0]][0].input_tensors[0]
        else:
            joined = nodes[getattr(self, medium.join)][0].outputs[0]
        return Cut(
            medium,
            # A tower may take more than that.
            next((x for x in read if x.name == medium.given), read[0]),
            towers[-1].outputs[0],
            joined,
        )

    @property
    def cuts(self):
        """Where the graph is cut, as `Cuts`."""
        return self._source

    def new_wiring(self, graph=None):
        if not self.has_towers:
            return super().new_wiring(graph)
        dtype = floating_policy(self.blocks[0])
        in_grids = self.roles.grid_positions is not None
        wiring = GridWiring if in_grids else MediaWiring
        return wiring(dtype, graph, self.roles, self)

    def _set_graph(self, wiring, *args, **kwargs):
        self._roles = wiring.roles
        super()._set_graph(wiring, *args, **kwargs)

    def with_graph(self, wiring, *args, **kwargs):
        new = super().with_graph(wiring, *args, **kwargs)
        if self.has_towers:
            self._check_cuts(new)
        return new

    def _check_cuts(self, edited):
        """Raises a `ValueError` if text alone would not go through an edit."""
        joins = [x.joined._keras_history.operation for x in self.cuts]
        joined = [x for x in edited.sites if type(x.layer) is JoinedEmbeddings]
        outputs = [x for x in edited.sites if type(x.layer) is EncoderOutput]
        before = [
            x.node.input_tensors[0]._keras_history.operation for x in joined
        ]
        # Of a model that is loaded, they are others of the same classes.
        as_before = [type(x) for x in before] == [type(x) for x in joins]
        if as_before and len(outputs) == len(joins):
            return
        cuts = [name_of_output(x.medium) for x in self.cuts]
        cuts += [name_of_joined(x.medium, self.roles) for x in self.cuts]
        raise ValueError(
            "Expected an edit that leaves "
            f"{', '.join(map(repr, cuts[:-1]))} and {cuts[-1]!r} in the graph, "
            f"and {joins[-1].name!r} right before the latter, where text goes "
            "on alone if there are no images. "
            f"Received: {[x.name for x in (*outputs, *joined)]}, after "
            f"{[x.name for x in before]}. Insert layers after "
            f"{cuts[-1]!r}."
        )

    def further_arguments(self, operation, inputs):
        """What an operation of the graph is called with beyond upstream's.

        Args:
            operation: One that is no decoder block.
            inputs: Dictionary of the symbolic inputs of a graph.

        Returns:
            Dictionary of keyword arguments.
        """
        return {}

    def new_spans(self, inputs, **kwargs):
        """The symbolic spans of a call, int32 `(B, T)`, or `None` for none.

        Args:
            inputs: Dictionary of the symbolic inputs of a graph.
            **kwargs: Arguments of the layer that numbers them.
        """
        *_, mask = self.roles.images.beside
        return ImageSpans(**kwargs)(inputs[mask])

    # === How it is called ===

    def encode_images(self, images, **beside):
        """Runs the tower alone.

        Args:
            images: As upstream's backbone takes them.
            **beside: What else the tower takes, by the names that it has for
                the backbone.

        Returns:
            Tensor `(images, tokens, hidden_dim)`, or `(B, images, tokens,
            hidden_dim)`, to be passed as `"img_embeddings"`.
        """
        if not self.sees:
            raise ValueError(
                "Expected a model that reads images with the text that it "
                f"generates. Received: {self.name!r}, which reads none, or "
                "whose encoder reads them: call `encode()`."
            )
        return self.encode(self.roles.images, images, **beside)

    def encode_audio(self, audio, **beside):
        """Runs the tower of sound alone.

        Args:
            audio: As upstream's backbone takes it.
            **beside: What else the tower takes, by the names that it has for
                the backbone.

        Returns:
            Tensor `(B, clips, tokens, hidden_dim)`, to be passed as
            `"audio_embeddings"`.
        """
        medium = self.roles.medium("audio")
        if medium is None:
            raise ValueError(
                "Expected a model that reads sound with the text that it "
                f"generates. Received: {self.name!r}, which reads none."
            )
        return self.encode(medium, audio, **beside)

    def encode(self, medium, given, **beside):
        """Runs one of the towers alone.

        Args:
            medium: `Medium`.
            given: What it reads.
            **beside: What else it takes.

        Returns:
            Tensor, to be passed by the name of its output.
        """
        given = {medium.given: given, **beside}
        given = normalize_media(self.unpacked(given), self, None)
        # As a call with a cache runs it.
        given["cache_update_index"] = 0
        return self._computed(given, EncoderOutput, name_of_output(medium))

    def embed(self, inputs):
        """Embeds images, sound and text.

        Args:
            inputs: Dictionary, as the backbone is called with, without a cache.

        Returns:
            Tensor `(B, T, hidden_dim)`, to be passed as `"embeddings"`.
        """
        *_, last = self.roles.media
        name = name_of_joined(last, self.roles)
        return self._computed(self._normalize(inputs), JoinedEmbeddings, name)

    def _computed(self, inputs, kind, name):
        """What a layer returns, without what comes after it."""
        (node,) = (
            x for x in self.nodes_of_kind(kind) if x.operation.name == name
        )
        inputs = {**dict.fromkeys(self._inputs_struct), **inputs}
        inputs["cache"] = ((None, None),) * len(self.cache_spec)
        (found,) = self.values_of(node.outputs[:1], inputs)
        return found

    def _normalize(self, inputs):
        if not self.has_towers or not isinstance(inputs, dict):
            return super()._normalize(inputs)
        roles = self.roles
        text = {k: x for k, x in inputs.items() if k not in roles.of_media}
        text = normalize(
            text,
            self.cache_spec,
            self.max_positions,
            ("generated",) if self.takes_generated else (),
            roles,
            self.before if roles.has_media(inputs) else 0,
        )
        media = {name: inputs.get(name) for name in roles.of_media}
        return {**text, **normalize_media(self.unpacked(media), self, text)}

    def without_empty(self, media):
        """What was passed of media, without those of which there are none.

        Upstream's preprocessors say so by an axis of 0, for media that say
        where their tokens are.

        Args:
            media: As for `unpacked()`.
        """
        for cut in self.cuts:
            medium, rank = cut.medium, len(cut.given.shape)
            shape = getattr(media.get(medium.given), "shape", ())
            if len(shape) == rank and shape[1] == 0:
                none = medium.given, *medium.beside[:-1]
                media = {**media, **dict.fromkeys(none)}
        return media

    def unpacked(self, media):
        """What was passed of media, as upstream's graph takes it.

        Args:
            media: Dictionary for some of `Roles.of_media`.
        """
        return media

    def check_given(self, media):
        """Raises a `ValueError` for what a tower does not read.

        Args:
            media: Dictionary of tensors, or `None`, for `Roles.of_media`.
        """

    def check_media(self, media, text):
        """Raises a `ValueError` for media that do not fit a text.

        Args:
            media: As for `check_given()`.
            text: What `normalize()` made of all other inputs.
        """
        raise NotImplementedError

    def _output_spec(self, inputs, x):
        spec = super()._output_spec(inputs, x)
        batch, length, *further = spec.shape
        if length is None or not self.roles.has_media(inputs):
            return spec
        return keras.KerasTensor(
            (batch, length + self.before, *further), dtype=spec.dtype
        )
