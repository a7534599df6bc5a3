"""The graph of Gemma 3n, which upstream keeps in one layer."""

import operator

import keras
from keras.src.ops.numpy import Power

from keras_nlp_cache.graph.image_inputs import check_rows
from keras_nlp_cache.graph.image_inputs import known
from keras_nlp_cache.graph.image_places import check_in_text
from keras_nlp_cache.graph.image_places import places_of
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.layers.specializing import specialize_within
from keras_nlp_cache.models.gemma3n.images import ImagesInText
from keras_nlp_cache.models.gemma3n.images import ImageTower
from keras_nlp_cache.models.gemma3n.inputs import EmbeddingsOfMedia
from keras_nlp_cache.models.gemma3n.inputs import PerLayerInputs

# What upstream's preprocessor says of sound, whether there is any.
_SOUND = (
    "input_features",
    "input_features_mask",
    "audio_indices",
    "audio_mask",
)


@keras.saving.register_keras_serializable("keras_nlp_cache")
class PowerOfTensors(Power):
    """What `x**y` is of tensors that are no symbols.

    `ops.power()` differs in the last bit on PyTorch, and by processor:
    PyTorch multiplies where the exponent is the number 2, and not where it is
    a tensor that holds it.
    """

    def call(self, x1, x2):
        return operator.pow(x1, x2)


def _square_as_called(inputs, outputs):
    """Has powers in a graph be those of upstream, which calls its code."""
    for operation in keras.Function(inputs, outputs).operations:
        if type(operation) is Power:
            operation.__class__ = PowerOfTensors


class OpenedBackbone(ImageTextBackbone):
    """A backbone whose text model is opened: its layers are of the graph.

    In upstream's graph it is one layer, a loop over the blocks, and so is all
    that comes before. What they do is done once more, on symbolic tensors.

    Attributes:
        image_tower: The layer that sees images, and embeds what it sees. `None`
            without a `vision_encoder`.
    """

    image_roles = Roles(
        images="images",
        beside_images=("vision_indices", "vision_mask"),
        placed_by_tokens=True,
        image_embeddings="img_embeddings",
        embeddings="embeddings",
    )
    tower_name = "image_tower"
    join_name = "images_in_text"

    def __init__(self, inputs, outputs, **kwargs):
        # Which attributes upstream lists first depends on the backend.
        self._listed = tuple(
            name
            for layer in getattr(self, "_layers", ())
            for name, x in vars(self).items()
            if x is layer
        )
        specialize_within([self.embedding_processor])
        text_model, processor = self.language_model, self.embedding_processor
        dtype = text_model.dtype_policy
        self.image_tower = None
        if self.vision_encoder is not None:
            self.image_tower = ImageTower(
                processor, dtype=dtype, name="image_tower"
            )
            self.images_in_text = ImagesInText(
                processor.image_token_id, dtype=dtype, name="images_in_text"
            )
        roles = self.roles_as_constructed()
        inputs = {x.name: x for x in inputs}
        inputs = {name: inputs[name] for name in roles.of_upstream}
        self.transformer_layers = list(text_model.transformer_layers)
        self.token_embedding = text_model.embed_tokens
        token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
        x = self.token_embedding(token_ids)
        if self.vision_encoder is not None or self.audio_encoder is not None:
            x = EmbeddingsOfMedia(
                processor, dtype=dtype, name="embeddings_of_media"
            )(x, token_ids)
        if roles.images is not None:
            seen = self.image_tower(inputs[roles.images])
            x = self.images_in_text(seen, x, token_ids)
        of_layers = PerLayerInputs(
            processor, dtype=dtype, name="per_layer_inputs"
        )(x, token_ids)
        outputs = text_model.call(token_ids, padding_mask, x, of_layers)
        _square_as_called(inputs, outputs)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self._list_as_upstream()

    @property
    def inputs(self):
        # In the order of upstream's list.
        return [self.input[name] for name in self.roles.of_upstream]

    # Upstream's has what this does not read.
    @property
    def _model_inputs_dict(self):
        names = *self.roles.of_upstream, *self.roles.beside_images
        return {name: self._inputs_struct[name] for name in names}

    @_model_inputs_dict.setter
    def _model_inputs_dict(self, inputs):
        pass

    @property
    def output_embedding(self):
        return self.language_model.embed_tokens.embedding

    @property
    def layers(self):
        # Those of upstream's graph first, as in files.
        composed = [
            getattr(self, name, None)
            for name in ("embedding_processor", "language_model")
        ]
        composed = [x for x in composed if x is not None]
        return composed + [x for x in super().layers if x not in composed]

    def _list_as_upstream(self):
        """Lists layers, and with them weights, as upstream does."""
        first = [getattr(self, name) for name in self._listed]
        first = first or self.layers[:2]
        self._layers[:] = first + [x for x in self._layers if x not in first]

    def with_graph(self, *args, **kwargs):
        new = super().with_graph(*args, **kwargs)
        old, blocks = self.language_model, list(new.transformer_layers)
        text_model = share(
            old, transformer_layers=blocks, embed_tokens=new.token_embedding
        )
        # In which order layers are shared depends on the backend.
        blocks = dict.fromkeys(blocks)
        places = {old.embed_tokens: [new.token_embedding]}
        places |= dict.fromkeys(old.transformer_layers, ())
        places[old.transformer_layers[0]] = blocks
        text_model._layers[:] = [
            y for x in old._layers for y in places.get(x, [x])
        ]
        new.language_model = text_model
        new.embedding_processor = share(
            self.embedding_processor, language_model=text_model
        )
        # What an attribute held before is still listed.
        gone = old, self.embedding_processor
        new._layers[:] = [x for x in new._layers if x not in gone]
        new._list_as_upstream()
        return new

    @property
    def prefill_layers(self):
        if not self.sees:
            return []
        # What embeds features embeds tokens of images, too, in any step.
        return self.vision_encoder._flatten_layers()

    # === How it is called ===

    def _normalize(self, inputs):
        if isinstance(inputs, (list, tuple)):
            inputs = dict(zip(self.roles.of_upstream, inputs))
        if isinstance(inputs, dict):
            inputs = self.without_unread(inputs)
        return super()._normalize(inputs)

    def without_unread(self, inputs):
        """The inputs without those that say that there is no other medium.

        Raises:
            ValueError: If there is some, of a kind that is not read.
        """
        inputs, unread = dict(inputs), _SOUND
        if not self.sees:
            roles = self.image_roles
            unread = roles.images, *roles.beside_images, *_SOUND
        for name in unread:
            x = inputs.pop(name, None)
            shape = tuple(getattr(x, "shape", ()))
            if name in ("images", "input_features") and shape:
                if shape[1] != 0 and not isinstance(x, keras.KerasTensor):
                    raise ValueError(
                        f"Expected no `{name}`, which this package does not "
                        f"read with a {type(self).__name__!r}. Received some "
                        f"of shape {shape}. Use the class of the same name "
                        "from `keras_hub.models`."
                    )
        return inputs

    # === Images ===

    def further_arguments(self, operation, inputs):
        if not self.sees:
            return {}
        return {
            self.image_tower: {"index": inputs["cache_update_index"]},
            self.images_in_text: {"vision_mask": inputs["vision_mask"]},
        }.get(operation, {})

    def new_spans(self, inputs, **kwargs):
        return None  # All is causal.

    def unpacked(self, images):
        shape = getattr(images.get("images"), "shape", ())
        if len(shape) == 5 and shape[1] == 0:
            # As upstream's preprocessor says that there are none.
            return {**images, "images": None, "vision_indices": None}
        return images

    def placed(self, images, token_ids):
        """What was passed of images, with where they are.

        As upstream's code finds them, where that is not passed.

        Args:
            images: Dictionary for some of `Roles.of_images`.
            token_ids: int `(B, T)`.

        Returns:
            The dictionary, with `vision_mask` and `vision_indices` if there are
            images, and unless it is not known which tokens there are.
        """
        tokens = known(token_ids)
        mask = images.get("vision_mask")
        if mask is None and tokens is not None:
            mask = (tokens == self.image_token_id).astype("int32")
        given = self._given(images)
        inside = known(mask)
        if given is None or inside is None:
            return images
        places = images.get("vision_indices")
        number = images[given].shape[1]
        if places is None and number is not None:
            most = int((inside != 0).sum(axis=1).max(initial=0))
            count = number * self.image_tower.tokens
            if most > count:
                raise ValueError(
                    f"Expected at most {count} tokens of images in a row, for "
                    f"`{given}` of shape {tuple(images[given].shape)}. "
                    f"Received: {most}, by their id, {self.image_token_id}, or "
                    "by `vision_mask`."
                )
            places = places_of(inside, count)
        return {**images, "vision_mask": mask, "vision_indices": places}

    def _given(self, images):
        """Under which name there are images, `None` if there are none."""
        names = self.roles.images, self.roles.image_embeddings
        return next((x for x in names if images.get(x) is not None), None)

    def check_images(self, images, text):
        token_ids, given = text[self.roles.token_ids], self._given(images)
        if given is not None:
            check_rows(given, images[given], token_ids)
            images = self.placed(images, token_ids)
            if any(images[x] is None for x in self.roles.beside_images):
                return  # It is not known where they are.
        check_in_text(images, text, self.roles, self.image_tower.tokens)
        if given is not None:
            self._check_ids(known(images["vision_mask"]), known(token_ids))

    def _check_ids(self, mask, token_ids):
        """Raises a `ValueError` where upstream's code would put no image."""
        if mask is None or token_ids is None:
            return
        others = token_ids[(mask != 0) & (token_ids != self.image_token_id)]
        if len(others):
            raise ValueError(
                "Expected `vision_mask` to be 0 for all tokens but those of "
                f"images, which have the id {self.image_token_id}, the "
                "`image_token_id`. Received one that is not 0 for tokens with "
                f"the ids {sorted(set(others.tolist()))}."
            )
