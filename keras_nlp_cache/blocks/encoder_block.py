"""Blocks of an encoder, which sees all of what it reads at once."""

import keras

from keras_nlp_cache.blocks.replaying import active_wiring
from keras_nlp_cache.blocks.replaying import replaying
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.drop_in import stand_in
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.specializing import Specialized


class EncoderBlock(Specialized):
    """Mixin by which surgery knows the blocks of an encoder from other layers.

    `encoder_block()` makes the class for a block of upstream's. It remembers
    nothing, and computes what upstream's does.
    """

    def __call__(self, *args, **kwargs):
        wiring = active_wiring()
        if wiring is not None:
            if isinstance(first_argument(args, kwargs), keras.KerasTensor):
                with replaying(None):
                    return wiring.call_encoder_block(self, args, kwargs)
        return super().__call__(*args, **kwargs)


def encoder_block(upstream):
    """The class to give the encoder blocks of an upstream class."""
    found = stand_in(upstream)
    if found is not None:
        return found
    doc = f"A `{upstream.__name__}` that surgery knows for an encoder's."
    return replaces(upstream)(
        type(upstream.__name__, (EncoderBlock, upstream), {"__doc__": doc})
    )


def hidden_states_alone(outputs):
    """The hidden states, of all that a block returns.

    What else it returns for those that follow is handed to who replays the
    graph. Taps were collected before.
    """
    if isinstance(outputs, tuple) and isinstance(outputs[-1], dict):
        outputs = outputs[0]
    if not isinstance(outputs, tuple):
        return outputs
    hidden_states, *further = outputs
    block_call.carry(further)
    return hidden_states
