"""A backbone that reads images with its text.

What an image becomes stands in the text, as if there were tokens for it: before
all others, or in the place of some. So a cache has slots for it like any other,
and where images are read once, nothing of them is needed any more. What is
different is the call that reads them: some of its tokens see what follows them
(`cache/spans.py`), so it has to have all of these, and the graph can be given
what was computed of images before (`image_wiring.py`).
"""

import typing

import keras

from keras_nlp_cache.cache.source_inputs import EncoderOutput
from keras_nlp_cache.cache.source_inputs import JoinedEmbeddings
from keras_nlp_cache.cache.spans import ImageSpans
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.constructed import nodes_of
from keras_nlp_cache.graph.grid_wiring import GridWiring
from keras_nlp_cache.graph.image_inputs import normalize_images
from keras_nlp_cache.graph.image_wiring import ImageWiring
from keras_nlp_cache.graph.inputs import normalize
from keras_nlp_cache.graph.roles import TEXT
from keras_nlp_cache.quantization.quantizing import floating_policy


class Cuts(typing.NamedTuple):
    """Symbolic tensors of upstream's graph, at which ours is cut.

    Args:
        images: The images that go into the tower.
        tower: What comes out of it.
        joined: Images and text as one sequence.
    """

    images: typing.Any
    tower: typing.Any
    joined: typing.Any

    @property
    def inputs(self):
        """What can be given there, of texts of any length."""
        joined = self.joined
        shape = joined.shape[0], None, joined.shape[-1]
        return self.images, self.tower, keras.KerasTensor(shape, joined.dtype)


class ImageTextBackbone(CachedBackbone):
    """Base of backbones whose graph reads images.

    Four calls are possible, by what is passed beside `"token_ids"`:

    - with `"images"`, all of the graph runs,
    - with `"img_embeddings"` in their place, all but the tower that sees them,
    - with `"embeddings"`, only what comes after images and text are embedded,
    - with none of these, what is read is text.

    Images are read by one call, with all of the tokens that see each other. All
    later ones find in the cache what became of them.

    Attributes:
        image_roles: `Roles` of a model that sees.
        text_roles: `Roles` of one that does not.
        tower_name: Name of the attribute that holds the tower.
        after_tower: Names of those that hold what then comes of it alone, the
            last of which returns what the text is joined with.
        join_name: Name of the attribute that holds the layer that joins images
            and text, `None` if the first decoder block is called with what is
            joined.
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

    image_roles = text_roles = TEXT
    tower_name = "vision_encoder"
    after_tower = ()
    join_name = None
    windows_in_spans = True
    before = 0
    needs_images = False
    _roles = TEXT

    @property
    def roles(self):
        """What inputs are called. A model without a tower reads text."""
        return self._roles

    @property
    def sees(self):
        """Whether there is a tower of images."""
        return self.roles.images is not None

    @property
    def prefill_layers(self):
        """The layers that no decode step calls."""
        if not self.sees:
            return getattr(super(), "prefill_layers", [])
        names = self.tower_name, *self.after_tower
        towers = [getattr(self, name) for name in names]
        return [x for tower in towers for x in tower._flatten_layers()]

    # === How the graph is made ===

    def __init__(self, inputs, outputs, **kwargs):
        self._roles = self.roles_as_constructed()
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def roles_as_constructed(self):
        """`Roles` of upstream's graph, by what it was constructed with."""
        has_tower = getattr(self, self.tower_name) is not None
        return self.image_roles if has_tower else self.text_roles

    def _output_of_encoder(self, outputs):
        if not self.sees:
            return super()._output_of_encoder(outputs)
        names = self.tower_name, *self.after_tower
        nodes = nodes_of(outputs)
        towers = [nodes[getattr(self, name)][0] for name in names]
        seen = towers[0].input_tensors
        if self.join_name is None:
            joined = nodes[self.blocks[0]][0].input_tensors[0]
        else:
            joined = nodes[getattr(self, self.join_name)][0].outputs[0]
        return Cuts(
            # A tower may see more than images.
            next((x for x in seen if x.name == self.roles.images), seen[0]),
            towers[-1].outputs[0],
            joined,
        )

    @property
    def cuts(self):
        """Where the graph is cut, as `Cuts`."""
        return self._source

    def new_wiring(self, graph=None):
        if not self.sees:
            return super().new_wiring(graph)
        dtype = floating_policy(self.blocks[0])
        in_grids = self.roles.grid_positions is not None
        wiring = GridWiring if in_grids else ImageWiring
        return wiring(dtype, graph, self.roles, self)

    def _set_graph(self, wiring, *args, **kwargs):
        self._roles = wiring.roles
        super()._set_graph(wiring, *args, **kwargs)

    def with_graph(self, wiring, *args, **kwargs):
        new = super().with_graph(wiring, *args, **kwargs)
        if self.sees:
            self._check_cuts(new)
        return new

    def _check_cuts(self, edited):
        """Raises a `ValueError` if text alone would not go through an edit."""
        join = self.cuts.joined._keras_history.operation
        # Of a model that is loaded, it is another one of the same class.
        kind = type(join)
        joined = [x for x in edited.sites if type(x.layer) is JoinedEmbeddings]
        towers = [x for x in edited.sites if type(x.layer) is EncoderOutput]
        before = [
            x.node.input_tensors[0]._keras_history.operation for x in joined
        ]
        if [type(x) for x in before] == [kind] and len(towers) == 1:
            return
        raise ValueError(
            "Expected an edit that leaves 'image_encoder_output' and "
            f"'joined_embeddings' in the graph, and {join.name!r} right before "
            "the latter, where text goes on alone if there are no images. "
            f"Received: {[x.name for x in (*towers, *joined)]}, after "
            f"{[x.name for x in before]}. Insert layers after "
            "'joined_embeddings'."
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
        *_, mask = self.roles.beside_images
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
        given = {self.roles.images: images, **beside}
        given = normalize_images(self.unpacked(given), self, None)
        # As a call with a cache runs it.
        given["cache_update_index"] = 0
        return self._computed(given, EncoderOutput)

    def embed(self, inputs):
        """Embeds images and text.

        Args:
            inputs: Dictionary, as the backbone is called with, without a cache.

        Returns:
            Tensor `(B, T, hidden_dim)`, to be passed as `"embeddings"`.
        """
        return self._computed(self._normalize(inputs), JoinedEmbeddings)

    def _computed(self, inputs, kind):
        """What the layer of a class returns, without what comes after it."""
        (node,) = self.nodes_of_kind(kind)
        inputs = {**dict.fromkeys(self._inputs_struct), **inputs}
        inputs["cache"] = ((None, None),) * len(self.cache_spec)
        (found,) = self.values_of(node.outputs[:1], inputs)
        return found

    def _normalize(self, inputs):
        if not self.sees or not isinstance(inputs, dict):
            return super()._normalize(inputs)
        roles = self.roles
        text = {k: x for k, x in inputs.items() if k not in roles.of_images}
        text = normalize(
            text,
            self.cache_spec,
            self.max_positions,
            ("generated",) if self.takes_generated else (),
            roles,
            self.before if roles.has_images(inputs) else 0,
        )
        images = {name: inputs.get(name) for name in roles.of_images}
        return {**text, **normalize_images(self.unpacked(images), self, text)}

    def unpacked(self, images):
        """What was passed of images, as upstream's graph takes it.

        Args:
            images: Dictionary for some of `Roles.of_images`.
        """
        return images

    def _output_spec(self, inputs, x):
        spec = super()._output_spec(inputs, x)
        batch, length, *further = spec.shape
        if length is None or not self.roles.has_images(inputs):
            return spec
        return keras.KerasTensor(
            (batch, length + self.before, *further), dtype=spec.dtype
        )
