"""BART: the layers of GPT-2, and blocks that read what an encoder returned."""

import keras_hub

from keras_nlp_cache.blocks.encoder_block import encoder_block
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.seq_2_seq_lm import Seq2SeqLM
from keras_nlp_cache.graph.encoder_decoder import EncoderDecoderBackbone

encoder_block(keras_hub.layers.TransformerEncoder)


@replaces(keras_hub.models.BartBackbone)
class BartBackbone(keras_hub.models.BartBackbone, EncoderDecoderBackbone):
    """BART with a cache in its graph.

    A drop-in replacement for `keras_hub.models.BartBackbone`: the same
    arguments, weights and files. `EncoderDecoderBackbone` describes what it can
    be called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.BartBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=32,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    outputs, cache = backbone({
        "encoder_token_ids": [[4, 5, 6]],
        "decoder_token_ids": [[1, 2, 3]],
        "cache": cache,
        "cache_update_index": 0,
    })
    ```

    Reference:
        https://arxiv.org/abs/1910.13461
    """


@replaces(keras_hub.models.BartSeq2SeqLM)
class BartSeq2SeqLM(Seq2SeqLM, keras_hub.models.BartSeq2SeqLM):
    """BART that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.BartSeq2SeqLM`. See
    `Seq2SeqLM`.
    """

    backbone_cls = BartBackbone
