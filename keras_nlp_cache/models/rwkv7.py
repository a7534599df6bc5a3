"""RWKV-7: no attention, but a state, and the token before, in each block."""

import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.models.rwkv7 import rwkv7_layer

from keras_nlp_cache.attention.recurrent import last_of
from keras_nlp_cache.attention.recurrent import Recurrent
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone


@replaces(rwkv7_layer.RWKV7_Block)
class RWKV7_Block(DecoderBlock, rwkv7_layer.RWKV7_Block):
    """A block whose two layers remember.

    It returns the values of the first block, too, for those that follow.
    """

    carries = ("v_first",)

    def build(self, input_shape):
        # Upstream's takes a list, which a file has, for several shapes.
        super().build(tuple(input_shape))

    def arranged(self, args, kwargs):
        # The padding mask is popped by name.
        args, kwargs = super().arranged(args, kwargs)
        names = self.call_signature_parameters[1:]
        return args[:1], {**dict(zip(names, args[1:])), **kwargs}

    def upstream_spec(self, *args, **kwargs):
        spec = super().upstream_spec
        return spec(*args, **kwargs), spec(*args, **kwargs)


@replaces(rwkv7_layer.RWKV7TimeMix)
class RWKV7TimeMix(Recurrent, rwkv7_layer.RWKV7TimeMix):
    """Linear attention, with a matrix for each head in place of a cache."""

    of_each_token = ("v_first",)

    @property
    def state_shapes(self):
        size = self.head_size
        return StateShapes((self.n_head, size, size), (1, self.hidden_size))

    def advance(self, x, state, real, kwargs):
        memory, last = state[0], ops.cast(state[1], x.dtype)
        output, v_first, _, memory = rwkv7_layer.RWKV7TimeMix.call(
            self,
            x,
            v_first=kwargs.get("v_first"),
            padding_mask=real,
            last_cache_x=last,
            cache_state=memory,
            rnn_mode=x.shape[1] == 1,
            not_generation_mode=False,
        )
        return (output, v_first), (memory, last_of(last, x, real))

    def returned(self, output):
        return *output, None


@replaces(rwkv7_layer.RWKV7ChannelMix)
class RWKV7ChannelMix(Recurrent, rwkv7_layer.RWKV7ChannelMix):
    """A feed-forward network that looks at the token before."""

    @property
    def state_shapes(self):
        return StateShapes((1, self.value.units), (0,))

    def advance(self, x, state, real, kwargs):
        last, nothing = ops.cast(state[0], x.dtype), state[1]
        if real is not None:
            x = x * ops.cast(real, x.dtype)[:, :, None]
        output, _ = rwkv7_layer.RWKV7ChannelMix.call(
            self, x, last_cache_x=last, not_generation_mode=False
        )
        return output, (last_of(last, x, real), nothing)


@replaces(keras_hub.models.RWKV7Backbone)
class RWKV7Backbone(keras_hub.models.RWKV7Backbone, CachedBackbone):
    """RWKV-7 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.RWKV7Backbone`: the same
    arguments, weights and files, and as upstream's, it returns logits in the
    place of hidden states. `CachedBackbone` describes what it can be called
    with beyond upstream's inputs. Its cache has one size, for any `max_length`.

    Example:

    ```python
    backbone = keras_nlp_cache.models.RWKV7Backbone(
        vocabulary_size=100, num_layers=2, hidden_size=32, head_size=8,
        intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    logits, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2503.14456
    """

    blocks_name = "rwkv_layers"


@replaces(keras_hub.models.RWKVTokenizer)
class RWKVTokenizer(keras_hub.models.RWKVTokenizer):
    """A tokenizer whose tokens become text at any length.

    Upstream's returns a list for one text, and fails where a text ends in the
    middle of a character, as what is generated may, or has a token that stands
    for no word, of which the published models have some.
    """

    @classmethod
    def over(cls, tokenizer):
        """One of this class, with the words of upstream's, or another kind."""
        if type(tokenizer) is not keras_hub.models.RWKVTokenizer:
            return tokenizer
        ours = cls.from_config({**tokenizer.get_config(), "vocabulary": None})
        # What it looks words up in takes hundreds of MB.
        ours.vocabulary = tokenizer.vocabulary
        ours._tokenizer = tokenizer._tokenizer
        return ours

    def detokenize(self, inputs):
        self._check_vocabulary()
        if not isinstance(inputs, (list, tuple)):
            inputs = ops.convert_to_numpy(inputs)
        if len(inputs) and np.ndim(inputs[0]):
            return [self.detokenize(row) for row in inputs]
        words = self._tokenizer.idx2token
        text = b"".join(words.get(int(x), b"") for x in inputs if int(x) != 0)
        return text.decode("utf-8", errors="replace")


@replaces(keras_hub.models.RWKV7CausalLMPreprocessor)
class RWKV7CausalLMPreprocessor(keras_hub.models.RWKV7CausalLMPreprocessor):
    """Prompts as those of all families, padded at their end.

    To train, texts are prepared as by upstream's.
    """

    tokenizer_cls = RWKVTokenizer

    def __init__(self, tokenizer, **kwargs):
        super().__init__(RWKVTokenizer.over(tokenizer), **kwargs)

    @classmethod
    def over(cls, preprocessor):
        """One of this class, over the tokenizer of another preprocessor."""
        if preprocessor is None or isinstance(preprocessor, cls):
            return preprocessor
        config = {**preprocessor.get_config(), "tokenizer": None}
        return cls(**{**config, "tokenizer": preprocessor.tokenizer})

    def generate_preprocess(self, x, sequence_length=None):
        if isinstance(x, str):
            x = [x]
        length = sequence_length or self.sequence_length
        token_ids, mask = keras_hub.layers.StartEndPacker(
            sequence_length=length,
            pad_value=self.tokenizer.pad_token_id,
            return_padding_mask=True,
        )(self.tokenizer(x))
        return {"token_ids": token_ids, "padding_mask": mask}

    def generate_postprocess(self, x):
        mask = ops.convert_to_numpy(x["padding_mask"]).astype("int32")
        token_ids = ops.convert_to_numpy(x["token_ids"])
        return self.tokenizer.detokenize(token_ids * mask)


@replaces(keras_hub.models.RWKV7CausalLM)
class RWKV7CausalLM(CausalLM, keras_hub.models.RWKV7CausalLM):
    """RWKV-7 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.RWKV7CausalLM`. See `CausalLM`.

    Differs from upstream, on purpose: `max_length` counts the tokens of the
    prompt, too, as in all families, token 0 may be part of a text, and what
    `call_with_cache()` returns in the place of hidden states are logits.
    """

    backbone_cls = RWKV7Backbone
    preprocessor_cls = RWKV7CausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        preprocessor = RWKV7CausalLMPreprocessor.over(preprocessor)
        super().__init__(backbone, preprocessor, **kwargs)

    def _logits(self, hidden_states):
        return hidden_states
