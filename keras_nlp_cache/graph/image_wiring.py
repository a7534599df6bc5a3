"""How a cache is threaded through a graph that reads images, too.

The graph is cut twice. Where the tower of images ends, `EncoderOutput` takes
what it returned in an earlier call. Where the text begins, `JoinedEmbeddings`
takes the embeddings of images and text together, and goes on with the text
alone if there are no images. So a decode step calls nothing of the tower. If
token ids are others where images are, `JoinedTokens` is where they are told.
"""

import keras
from keras import tree

from keras_nlp_cache.cache.source_inputs import EncoderOutput
from keras_nlp_cache.cache.source_inputs import JoinedEmbeddings
from keras_nlp_cache.cache.source_inputs import JoinedTokens
from keras_nlp_cache.cache.spans import PositionsAfter
from keras_nlp_cache.cache.spans import SpanMask
from keras_nlp_cache.graph.constructed import comes_of
from keras_nlp_cache.graph.wiring import Wiring


class ImageWiring(Wiring):
    """The inputs of one graph, and what is threaded through it.

    Args:
        dtype: As for `Wiring`, like the next two.
        graph: Optional `keras.Function`.
        roles: `Roles`.
        backbone: An `ImageTextBackbone`, which says what inputs look like,
            where the graph is cut, and what spans there are.
    """

    def __init__(self, dtype, graph, roles, backbone):
        self._backbone = backbone
        self._spans = self._tower_output = None
        self._cuts = backbone.cuts
        super().__init__(dtype, graph, roles)

    def _new_input(self, name):
        if name not in self._roles.images_of_upstream:
            return super()._new_input(name)
        if self._graph is None:
            return _input_like(self._backbone.input[name], name)
        (x,) = (x for x in self._graph.inputs if x.name == name)
        return _input_like(x, name)

    def _new_positions(self):
        names = self._roles.image_embeddings, self._roles.embeddings
        for name, x in zip(names, self._cuts.inputs[1:]):
            self.inputs[name] = _input_like(x, name)
        for name in self._roles.beside_images:
            if name not in self.inputs:
                # Which upstream's backbone has not: of tokens.
                self.inputs[name] = keras.Input(
                    (None,), dtype="int32", name=name, optional=True
                )
        return self._place_tokens(
            index=self.inputs["cache_update_index"],
            token_positions=self.inputs["token_positions"],
            attention_mask=self.inputs["attention_mask"],
        )

    def _place_tokens(self, **arguments):
        """The symbolic positions of tokens, and of images before them."""
        positions = PositionsAfter(
            self._backbone.before, dtype=self._dtype, name="positions"
        )
        return positions(
            self.inputs[self._roles.token_ids],
            **arguments,
            images=self.inputs[self._roles.images],
            image_embeddings=self.inputs[self._roles.image_embeddings],
            embeddings=self.inputs[self._roles.embeddings],
        )

    def _sees_spans(self, layer):
        return layer.sees_spans

    def _new_mask(self, window, sees_spans, name, **arguments):
        if not sees_spans:
            return super()._new_mask(window, sees_spans, name, **arguments)
        if self._spans is None:
            self._spans = self._backbone.new_spans(
                self.inputs, dtype=self._dtype, name="spans"
            )
        mask = SpanMask(
            window,
            self._backbone.windows_in_spans,
            dtype=self._dtype,
            name=name,
        )
        return mask(self.positions, spans=self._spans, **arguments)

    def call_operation(self, operation, args, kwargs):
        further = self._backbone.further_arguments(operation, self.inputs)
        kwargs = {**kwargs, **further}
        x = super().call_operation(operation, args, kwargs)
        if operation is self._cuts.tower._keras_history.operation:
            self._tower_output = EncoderOutput(
                dtype=self._dtype, name="image_encoder_output"
            )(x, given=self.inputs[self._roles.image_embeddings])
            return self._tower_output
        if self._joins_tokens(operation, args, kwargs):
            return JoinedTokens(dtype=self._dtype, name="joined_tokens")(
                x, text=self.inputs[self._roles.token_ids]
            )
        if operation is not self._cuts.joined._keras_history.operation:
            return x
        # Two sequences are joined. One of them is of images.
        (text,) = (
            y
            for y in tree.flatten((args, kwargs))
            if isinstance(y, keras.KerasTensor)
            and len(y.shape) == 3
            and not comes_of(y, self._tower_output)
        )
        return JoinedEmbeddings(dtype=self._dtype, name="joined_embeddings")(
            x, text=text, given=self.inputs[self._roles.embeddings]
        )

    def _joins_tokens(self, operation, args, kwargs):
        """Whether an operation puts others in the place of token ids.

        By what says where images are. Layers embed them.
        """
        if isinstance(operation, keras.layers.Layer):
            return False
        *_, mask = self._roles.beside_images or (None,)
        found = [
            x
            for x in tree.flatten((args, kwargs))
            if isinstance(x, keras.KerasTensor)
        ]
        return any(x is self.inputs[self._roles.token_ids] for x in found) and (
            any(comes_of(x, self.inputs.get(mask)) for x in found)
        )


def _input_like(x, name):
    return keras.Input(x.shape[1:], dtype=x.dtype, name=name, optional=True)
