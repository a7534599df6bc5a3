"""How a cache is threaded through a graph that reads images, too.

The graph is cut twice for each tower. Where that ends, `EncoderOutput` takes
what it returned in an earlier call. Where images, or sound, are joined with the
text, `JoinedEmbeddings` goes on with the text alone if there are none, and the
last one takes the embeddings of all together. So a decode step calls nothing of
a tower. If token ids are others where images are, `JoinedTokens` is where they
are told.
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


class MediaWiring(Wiring):
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
        self._spans, self._told = None, 0
        self._cuts = backbone.cuts
        # By the kind of a medium, what its tower returned.
        self._outputs = {}
        # The `id()`s of what is a text, with whatever was put into it so far.
        self._texts = set()
        super().__init__(dtype, graph, roles)

    def _new_input(self, name):
        if name not in self._roles.media_of_upstream:
            return super()._new_input(name)
        if self._graph is None:
            return _input_like(self._backbone.input[name], name)
        (x,) = (x for x in self._graph.inputs if x.name == name)
        return _input_like(x, name)

    def _new_positions(self):
        for cut in self._cuts:
            name = cut.medium.output
            self.inputs[name] = _input_like(cut.tower, name)
        name = self._roles.embeddings
        self.inputs[name] = _input_like(self._cuts.embeddings, name)
        self._texts.add(id(self.inputs[self._roles.token_ids]))
        for name in self._roles.beside_media:
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
        medium, *_ = self._roles.media
        positions = PositionsAfter(
            self._backbone.before, dtype=self._dtype, name="positions"
        )
        return positions(
            self.inputs[self._roles.token_ids],
            **arguments,
            images=self.inputs[medium.given],
            image_embeddings=self.inputs[medium.output],
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
        tensors = [
            y
            for y in tree.flatten((args, kwargs))
            if isinstance(y, keras.KerasTensor)
        ]
        for cut in self._cuts:
            if operation is cut.tower._keras_history.operation:
                return self._after_tower(cut.medium, x)
            if operation is cut.joined._keras_history.operation:
                return self._text(self._joined(cut.medium, x, tensors))
        alone = self._text_alone(operation, tensors)
        if alone is None:
            return x
        # Layers of a graph have names of their own.
        number = f"_{self._told}" if self._told else ""
        name, self._told = f"joined_tokens{number}", self._told + 1
        return self._text(
            JoinedTokens(dtype=self._dtype, name=name)(x, text=alone)
        )

    def _text(self, x):
        self._texts.add(id(x))
        return x

    def _after_tower(self, medium, x):
        """Where what was made of a medium before can be given."""
        x = EncoderOutput(dtype=self._dtype, name=name_of_output(medium))(
            x, given=self.inputs[medium.output]
        )
        self._outputs[medium.kind] = x
        return x

    def _joined(self, medium, x, tensors):
        """Where text goes on alone if there is nothing of a medium.

        Args:
            medium: `Medium`.
            x: Symbolic tensor, that joined with the text.
            tensors: List of those that are joined, and of what says how.
        """
        # Two sequences are joined. One of them is of this medium.
        (text,) = (
            y
            for y in tensors
            if len(y.shape) == 3 and not comes_of(y, self._outputs[medium.kind])
        )
        given = {}
        if _is_last(medium, self._roles):
            given["given"] = self.inputs[self._roles.embeddings]
        return JoinedEmbeddings(
            dtype=self._dtype, name=name_of_joined(medium, self._roles)
        )(x, text=text, **given)

    def _text_alone(self, operation, tensors):
        """What goes on if nothing says where a medium is, or `None`.

        For an operation that puts something into a text by what says so. Layers
        embed, or read it.

        Args:
            operation: One of the graph.
            tensors: List of the symbolic tensors that it is called on.
        """
        if isinstance(operation, keras.layers.Layer):
            return None
        texts = [x for x in tensors if id(x) in self._texts]
        masks = [self.inputs.get(name) for name in self._roles.masks]
        told = any(
            comes_of(x, mask)
            for x in tensors
            for mask in masks
            if id(x) not in self._texts
        )
        return texts[-1] if texts and told else None


def name_of_output(medium):
    """What the layer is called at which a tower ends."""
    return f"{medium.kind}_encoder_output"


def name_of_joined(medium, roles):
    """What the layer is called at which a medium was joined with the text."""
    if _is_last(medium, roles):
        return "joined_embeddings"
    return f"joined_{medium.noun}s"


def _is_last(medium, roles):
    return medium.kind == roles.media[-1].kind


def _input_like(x, name):
    return keras.Input(x.shape[1:], dtype=x.dtype, name=name, optional=True)
