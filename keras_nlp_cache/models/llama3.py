"""Llama 3: the graph of Llama under a name of its own, and its tokenizer."""

import keras_hub

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers.specializing import specialize
from keras_nlp_cache.models.llama import LlamaBackbone
from keras_nlp_cache.models.llama import LlamaCausalLM


@replaces(keras_hub.models.Llama3Backbone)
class Llama3Backbone(keras_hub.models.Llama3Backbone, LlamaBackbone):
    """Llama 3 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Llama3Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Llama3Backbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2407.21783
    """


@replaces(keras_hub.models.Llama3Tokenizer)
class Llama3Tokenizer(keras_hub.models.Llama3Tokenizer):
    """A tokenizer that remembers which special tokens it was made with.

    Upstream's is saved without them, and when it is loaded expects those of
    Llama 3. A model of the same architecture with others, such as SmolLM2,
    could then be saved and not loaded again.
    """

    def __init__(self, *args, misc_special_tokens=None, **kwargs):
        if misc_special_tokens is not None:
            # A set, which JSON does not know.
            kwargs["misc_special_tokens"] = set(misc_special_tokens)
        super().__init__(*args, **kwargs)

    def get_config(self):
        special = {getattr(self, name) for name in self._special_token_attrs}
        return {
            **super().get_config(),
            "bos_token": self.start_token,
            "eos_token": self.end_token,
            "misc_special_tokens": sorted(
                special - {self.start_token, self.end_token}
            ),
        }

    @staticmethod
    def is_needed(tokenizer):
        """Whether upstream's tokenizer could not load what it saves."""
        if type(tokenizer) is not keras_hub.models.Llama3Tokenizer:
            return False
        expected = keras_hub.models.Llama3Tokenizer()
        return tokenizer.vocabulary is not None and any(
            getattr(expected, name) not in tokenizer.vocabulary
            for name in expected._special_token_attrs
        )


@replaces(keras_hub.models.Llama3CausalLM)
class Llama3CausalLM(LlamaCausalLM, keras_hub.models.Llama3CausalLM):
    """Llama 3 that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Llama3CausalLM`. See `CausalLM`.
    """

    backbone_cls = Llama3Backbone

    def __init__(self, backbone, preprocessor=None, **kwargs):
        tokenizer = getattr(preprocessor, "tokenizer", None)
        if Llama3Tokenizer.is_needed(tokenizer):
            specialize(tokenizer, Llama3Tokenizer)
        super().__init__(backbone, preprocessor, **kwargs)
