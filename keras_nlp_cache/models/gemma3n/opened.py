"""The graph of Gemma 3n, which upstream keeps in one layer."""

import operator

import keras
from keras.src.ops.numpy import Power

from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.layers.specializing import specialize_within
from keras_nlp_cache.models.gemma3n.inputs import EmbeddingsOfMedia
from keras_nlp_cache.models.gemma3n.inputs import PerLayerInputs

# What upstream's preprocessor says of what is no text, whether there is any.
_MEDIA = (
    "images",
    "vision_indices",
    "vision_mask",
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


class OpenedBackbone(CachedBackbone):
    """A backbone whose text model is opened: its layers are of the graph.

    In upstream's graph it is one layer, a loop over the blocks. What that does
    is done once more, on symbolic tensors.
    """

    def __init__(self, inputs, outputs, **kwargs):
        # Which attributes upstream lists first depends on the backend.
        self._listed = tuple(
            name
            for layer in getattr(self, "_layers", ())
            for name, x in vars(self).items()
            if x is layer
        )
        inputs = {x.name: x for x in inputs}
        inputs = {name: inputs[name] for name in self.roles.of_upstream}
        specialize_within([self.embedding_processor])
        text_model, processor = self.language_model, self.embedding_processor
        self.transformer_layers = list(text_model.transformer_layers)
        self.token_embedding = text_model.embed_tokens
        token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
        x = self.token_embedding(token_ids)
        dtype = text_model.dtype_policy
        if self.vision_encoder is not None or self.audio_encoder is not None:
            x = EmbeddingsOfMedia(
                processor, dtype=dtype, name="embeddings_of_media"
            )(x, token_ids)
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
        return self.input

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

    def _normalize(self, inputs):
        if isinstance(inputs, (list, tuple)):
            inputs = dict(zip(self.roles.of_upstream, inputs))
        if isinstance(inputs, dict):
            inputs = self._of_text(inputs)
        return super()._normalize(inputs)

    def _of_text(self, inputs):
        """The inputs without those that say that there is no other medium."""
        inputs = dict(inputs)
        for name in _MEDIA:
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
