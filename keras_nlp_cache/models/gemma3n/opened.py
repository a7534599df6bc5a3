"""The graph of Gemma 3n, which upstream keeps in one layer."""

from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.layers.specializing import specialize_within
from keras_nlp_cache.models.gemma3n.images import ImagesInText
from keras_nlp_cache.models.gemma3n.images import ImageTower
from keras_nlp_cache.models.gemma3n.inputs import EmbeddingsOfMedia
from keras_nlp_cache.models.gemma3n.inputs import PerLayerInputs
from keras_nlp_cache.models.gemma3n.powers import square_as_called
from keras_nlp_cache.models.gemma3n.seeing import ImagesByTokenBackbone


class OpenedBackbone(ImagesByTokenBackbone):
    """A backbone whose text model is opened: its layers are of the graph.

    In upstream's graph it is one layer, a loop over the blocks, and so is all
    that comes before. What they do is done once more, on symbolic tensors.
    """

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
        if roles.media:
            seen = self.image_tower(inputs[roles.images.given])
            x = self.images_in_text(seen, x, token_ids)
        of_layers = PerLayerInputs(
            processor, dtype=dtype, name="per_layer_inputs"
        )(x, token_ids)
        outputs = text_model.call(token_ids, padding_mask, x, of_layers)
        square_as_called(inputs, outputs)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self._list_as_upstream()

    @property
    def inputs(self):
        # In the order of upstream's list.
        return [self.input[name] for name in self.roles.of_upstream]

    # Upstream's has what this does not read.
    @property
    def _model_inputs_dict(self):
        names = *self.roles.of_upstream, *self.roles.beside_media
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
