"""What the layers of a graph need of its encoder or tower, computed once.

The encoder's part of a graph ends where `EncoderOutput` begins. What was
returned there in an earlier call can be given, or is in the cache: then there
is nothing for the encoder to read, and its layers are not called.
"""

import keras
from keras import ops

from keras_nlp_cache.cache.masks import additive
from keras_nlp_cache.cache.shared_inputs import Weightless


class Cut(keras.layers.Layer):
    """Where a graph goes on with what was computed before, if that is given.

    Attributes:
        called_on_nothing: bool. It is called where what comes before it is not.
    """

    called_on_nothing = True

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def call(self, x, given=None):
        return x if given is None else given

    def compute_output_spec(self, x, *args, **kwargs):
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call

    def get_config(self):
        return super().get_config()


@keras.saving.register_keras_serializable("keras_nlp_cache")
class EncoderOutput(Cut):
    """Where the encoder ends, and decoder blocks begin to read.

    Call arguments:
        x: Tensor `(B, S, source_dim)`, what the encoder returned now. `None` if
            it was not called.
        given: Optional tensor `(B, S, source_dim)`, what it returned before.

    Returns:
        What there is of the two, `None` if there is nothing to read.
    """


@keras.saving.register_keras_serializable("keras_nlp_cache")
class JoinedEmbeddings(Cut):
    """Where a text begins, and what was embedded of images in it.

    Call arguments:
        x: Tensor `(B, T, hidden_dim)`, both of them. `None` without images.
        text: Tensor `(B, T, hidden_dim)`, the embeddings of the text alone.
        given: Optional tensor `(B, T, hidden_dim)`, both of them, computed
            before.

    Returns:
        What there is of the three.
    """

    def call(self, x, text=None, given=None):
        x = super().call(x, given)
        return text if x is None else x

    def compute_output_spec(self, x, text=None, given=None):
        # Upstream's may say that it is as long as an image.
        shape = x.shape[0], None, *x.shape[2:]
        return keras.KerasTensor(shape, dtype=x.dtype)


@keras.saving.register_keras_serializable("keras_nlp_cache")
class JoinedSource(JoinedEmbeddings):
    """Where what an encoder reads beside a text is joined with that.

    Call arguments:
        x: Tensor `(B, S, ...)`, both of them. `None` if one is not there.
        text: Tensor `(B, S, ...)`, the text alone.

    Returns:
        What there is of the two.
    """


@keras.saving.register_keras_serializable("keras_nlp_cache")
class JoinedTokens(Cut):
    """The tokens of a text, of which some are of images.

    Call arguments:
        x: int tensor `(B, T)`, with others in the place of those of images.
            `None` if nothing says where these are.
        text: int tensor `(B, T)`, as they came.

    Returns:
        What there is of the two.
    """

    def call(self, x, text):
        return text if x is None else x


@keras.saving.register_keras_serializable("keras_nlp_cache")
class EncoderMask(EncoderOutput):
    """Which of what the encoder returned is padding, where that says so.

    What is padding of sound, say, is another thing than what is padding of what
    an encoder makes of it.

    Call arguments:
        x: bool tensor `(B, S)`, from the encoder's part of the graph. `None` if
            it was not called.
        given: Optional tensor `(B, S)`, with what the encoder returned before.

    Returns:
        bool, what there is of the two.
    """

    def call(self, x, given=None):
        return ops.cast(given, "bool") if x is None and given is not None else x


class SourceMask(Weightless):
    """What each token may attend to of what the encoder returned.

    Call arguments:
        source: Optional tensor `(B, S, source_dim)`, if it is read now.
        padding_mask: Optional tensor `(B, S)` or `(B, 1, S)`, 0 for padding.
        key: Optional, what is kept of the keys of the first layer that
            attends to it.
        positions: Optional, what `Positions` returned, for layers that attend
            to that and to the text in one softmax. Where these need a mask of
            ours for the text, they do for the rest.

    Returns:
        float32, `(B, 1, 1, S)`, to be added to the attention logits. `None`
        without a cache: upstream's code has a mask of its own.
    """

    def call(self, source, padding_mask=None, key=None, positions=None):
        if key is None and positions is None:
            return None
        if source is None:
            return key.mask
        if padding_mask is None:
            batch, length = ops.shape(source)[:2]
            return ops.zeros((batch, 1, 1, length), "float32")
        mask = additive(padding_mask)
        batch, length = ops.shape(mask)[0], ops.shape(mask)[-1]
        return ops.reshape(mask, (batch, 1, 1, length))

    def compute_output_spec(
        self, source, padding_mask=None, key=None, positions=None
    ):
        return keras.KerasTensor((None, 1, 1, source.shape[1]), "float32")
