"""Gemma 3n: four streams, inputs for each layer, keys and values in common."""

import functools
import types

import keras
import keras_hub
from keras import ops
from keras_hub.src.models.gemma3n import gemma3n_attention
from keras_hub.src.models.gemma3n import gemma3n_backbone
from keras_hub.src.models.gemma3n import gemma3n_text_decoder
from keras_hub.src.models.gemma3n import gemma3n_text_layers
from keras_hub.src.models.gemma3n import gemma3n_text_model

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.sharing import SharingAttention
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.layers.specializing import give_class
from keras_nlp_cache.layers.specializing import specialize_within
from keras_nlp_cache.layers.specializing import Specialized


@replaces(gemma3n_attention.Gemma3nTextAttention)
class Gemma3nTextAttention(
    SharingAttention, gemma3n_attention.Gemma3nTextAttention
):
    """Grouped-query attention that remembers, or reads an earlier layer's."""

    scale = 1.0
    merges_heads = True
    dropout_of_weights = "dropout"
    shared_argument = "cache"
    heads_first = True

    @property
    def borrows(self):
        return self.is_kv_shared_layer

    @property
    def projections(self):
        names = {"query": "q_proj", "output": "o_proj"}
        if not self.borrows:
            names |= {"key": "k_proj", "value": "v_proj"}
        return names

    @property
    def key_value_shape(self):
        return self.num_key_value_heads, self.head_dim

    def compute_query_shape(self, input_shape):
        return (*input_shape[:2], self.num_attention_heads, self.head_dim)

    def rotary(self):
        return self.rotary_embedding

    def heads(self, name, x):
        x = super().heads(name, x)
        return ops.reshape(x, (*ops.shape(x)[:2], -1, self.head_dim))

    def project(self, x, positions):
        query = self.rotate(self.q_norm(self.heads("query", x)), positions)
        if self.borrows:
            return query, None, None
        key = self.rotate(self.k_norm(self.heads("key", x)), positions)
        return query, key, self.v_norm(self.heads("value", x))

    def call(self, hidden_states, attention_mask=None, **kwargs):
        # The mask comes by place.
        return super().call(
            hidden_states, attention_mask=attention_mask, **kwargs
        )

    def _all_at_once(self, x, attention_mask, cache=None, **kwargs):
        # A window is still to be put over the mask.
        cache = None if self.borrows else cache
        return CachedAttention._all_at_once(self, x, attention_mask, cache)

    def returned_with(self, output, shared):
        return output, None, shared

    def returned(self, output):
        return self.returned_with(output, None)


@replaces(gemma3n_text_layers.Gemma3nTextAltUp)
class Gemma3nTextAltUp(Specialized, gemma3n_text_layers.Gemma3nTextAltUp):
    """What a block makes of its streams, and starts from."""

    def predict(self, hidden_states):
        predictions = super().predict(hidden_states)
        if block_call.current() is not None:
            # The residual stream of the block, which edits inside it see.
            block_call.current().hidden_states = predictions[
                self.altup_active_idx
            ]
        return predictions


_gelu = functools.partial(keras.activations.gelu, approximate=True)


class _Packed:
    """Calls upstream's block with its three arguments as one."""

    def call(self, x, per_layer_input=None, padding_mask=None, **kwargs):
        return super().call((x, per_layer_input, padding_mask), **kwargs)


@replaces(gemma3n_text_decoder.Gemma3nTextDecoderBlock)
class Gemma3nTextDecoderBlock(
    DecoderBlock, _Packed, gemma3n_text_decoder.Gemma3nTextDecoderBlock
):
    """A block whose attention remembers, or reads an earlier layer's.

    It takes and returns all streams, `(streams, B, T, hidden_dim)`.
    """

    own_arguments = ("entries", "per_layer_input", "padding_mask")
    padding_argument = "padding_mask"
    carries = ("cache",)
    shared_argument = "cache"

    def on_specialized(self):
        super().on_specialized()
        if self.hidden_activation == "gelu_approximate":
            # One for all blocks, for them to be alike.
            self.act_fn = self.mlp.act_fn = _gelu

    def build(self, input_shape):
        # Upstream's takes no lists, which a file has.
        super().build(
            tuple(None if x is None else tuple(x) for x in input_shape)
        )

    def own_parts(self):
        return {
            "attention": "post_attention_layernorm",
            "attention.norm": "input_layernorm",
            "attention.post_norm": "post_attention_layernorm",
            "feedforward": "post_feedforward_layernorm",
            "feedforward.norm": "pre_feedforward_layernorm",
            "feedforward.post_norm": "post_feedforward_layernorm",
        }

    @property
    def streams(self):
        return self.altup_num_inputs

    def arranged(self, args, kwargs):
        args, kwargs = super().arranged(args, kwargs)
        if isinstance(args[0], (tuple, list)):
            (x, per_layer_input, padding_mask), *args = args
            kwargs = {
                **kwargs,
                "per_layer_input": per_layer_input,
                "padding_mask": padding_mask,
            }
            args = (x, *args)
        if not self.is_kv_shared_layer and "entries" in kwargs:
            # Of the block before, if it was called with what that was.
            kwargs = {**kwargs, "cache": None}
        return args, kwargs

    def upstream_spec(self, *args, **kwargs):
        x = super().upstream_spec(*args, **kwargs)
        heads, head_dim = self.num_key_value_heads, self.head_dim
        shape = x.shape[1], 2, heads, None, head_dim
        return x, keras.KerasTensor(shape, self.compute_dtype)


@replaces(gemma3n_text_model.Gemma3nTextModel)
class Gemma3nTextModel(Specialized, gemma3n_text_model.Gemma3nTextModel):
    """The text model, whose logits follow the weights of its embedding."""

    def on_specialized(self):
        embedding = self.embed_tokens.embedding
        give_class(embedding, keras.layers.ReversibleEmbedding)
        embedding.tie_weights = True
        embedding.reverse_dtype = None
        embedding.logit_soft_cap = self.final_logit_soft_cap
        if embedding.quantization_mode in ("int8", "int4"):
            embedding.inputs_quantizer = keras.quantizers.AbsMaxQuantizer(-1)

    def token_embedding(self, inputs, reverse=False):
        if not reverse:
            return self.embed_tokens(inputs)
        return self.embed_tokens.embedding(inputs, reverse=True)


@replaces(gemma3n_text_layers.Gemma3nTextScaledWordEmbedding)
class Gemma3nTextScaledWordEmbedding(
    Specialized, gemma3n_text_layers.Gemma3nTextScaledWordEmbedding
):
    """An embedding that says how many tokens there are."""

    @property
    def input_dim(self):
        return self.num_embeddings


class _OfProcessor(keras.layers.Layer):
    """Computes a part of what one layer of upstream's computes at once.

    That takes token ids. Here their embeddings are a layer of the graph, which
    an edit may change, and so is what is made of them.

    Args:
        processor: Upstream's layer, a `Gemma3nMultimodalEmbeddingProcessor`.
        **kwargs: See `keras.layers.Layer`.
    """

    def __init__(self, processor, **kwargs):
        super().__init__(**kwargs)
        self.constants = {
            name: getattr(processor, name)
            for name in (
                "image_token_id",
                "audio_token_id",
                "vocab_size_per_layer_input",
            )
        }
        self.built = True

    def run(self, token_ids, embeddings, of_text=None, **layers):
        """Runs upstream's code on given embeddings.

        Args:
            token_ids: int tensor `(B, T)`.
            embeddings: Tensor `(B, T, hidden_dim)`.
            of_text: Optional text model, to compute inputs of blocks with.
            **layers: What else the code is to find.

        Returns:
            `(embeddings, per_layer_inputs)`.
        """
        text_model = types.SimpleNamespace(
            embed_tokens=lambda token_ids: embeddings,
            get_per_layer_inputs=getattr(
                of_text, "get_per_layer_inputs", lambda token_ids: None
            ),
            project_per_layer_inputs=getattr(
                of_text, "project_per_layer_inputs", lambda *args: None
            ),
        )
        towers = "vision_encoder", "embed_vision", "audio_encoder"
        layers = {**dict.fromkeys((*towers, "embed_audio")), **layers}
        upstream = gemma3n_backbone.Gemma3nMultimodalEmbeddingProcessor
        return upstream.call(
            types.SimpleNamespace(
                language_model=text_model, **self.constants, **layers
            ),
            {"token_ids": token_ids},
        )


class EmbeddingsOfMedia(_OfProcessor):
    """Embeds tokens that are of images or of sound, as the text is.

    Call arguments:
        embeddings: Tensor `(B, T, hidden_dim)`, of all tokens as of the text.
        token_ids: int tensor `(B, T)`.

    Returns:
        A tensor like `embeddings`.
    """

    def __init__(self, processor, **kwargs):
        super().__init__(processor, **kwargs)
        self.embed_vision = processor.embed_vision
        self.embed_audio = processor.embed_audio

    def call(self, embeddings, token_ids):
        return self.run(
            token_ids,
            embeddings,
            embed_vision=self.embed_vision,
            embed_audio=self.embed_audio,
            # They are not called, but that they are there matters.
            vision_encoder=self.embed_vision is not None,
            audio_encoder=self.embed_audio is not None,
        )[0]

    def compute_output_spec(self, embeddings, token_ids):
        return keras.KerasTensor(embeddings.shape, embeddings.dtype)


class PerLayerInputs(_OfProcessor):
    """What each decoder block gets of the tokens beside hidden states.

    Call arguments:
        embeddings: Tensor `(B, T, hidden_dim)`.
        token_ids: int tensor `(B, T)`.

    Returns:
        Tensor `(B, T, blocks, hidden_size_per_layer_input)`.
    """

    def __init__(self, processor, **kwargs):
        super().__init__(processor, **kwargs)
        # All of it but its blocks, which may be taken out.
        self.text_model = share(
            processor.language_model,
            transformer_layers=[],
            altup_projections=[],
            altup_unembed_projections=[],
        )

    def call(self, embeddings, token_ids):
        return self.run(token_ids, embeddings, of_text=self.text_model)[1]

    def compute_output_spec(self, embeddings, token_ids):
        text_model = self.text_model
        shape = (
            *token_ids.shape,
            text_model.num_hidden_layers,
            text_model.hidden_size_per_layer_input,
        )
        return keras.KerasTensor(shape, self.compute_dtype)


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


class OpenedBackbone(CachedBackbone):
    """A backbone whose text model is opened: its layers are of the graph.

    In upstream's graph it is one layer, a loop over the blocks. What that does
    is done once more, on symbolic tensors.
    """

    def __init__(self, inputs, outputs, **kwargs):
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
        first = self.layers[:2]
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


@replaces(keras_hub.models.Gemma3nBackbone)
class Gemma3nBackbone(keras_hub.models.Gemma3nBackbone, OpenedBackbone):
    """Gemma 3n with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Gemma3nBackbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs.

    Its decoder blocks take and return `altup_num_inputs` streams of hidden
    states, `(streams, B, T, hidden_dim)`. The last `num_kv_shared_layers` of
    them read the keys and values of the last one before these that is of their
    type, and have no entry in the cache.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Gemma3nBackbone(
        text_vocab_size=100, text_hidden_size=32, num_hidden_layers=4,
        pad_token_id=0, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=[64] * 4,
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4, rope_theta=1e6, max_position_embeddings=64,
        vocab_size_per_layer_input=100, hidden_size_per_layer_input=8,
        altup_num_inputs=4, laurel_rank=4, num_kv_shared_layers=2,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    len(cache)  # 2
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://huggingface.co/google/gemma-3n-E2B-it
    """


@replaces(keras_hub.models.Gemma3nCausalLM)
class Gemma3nCausalLM(CausalLM, keras_hub.models.Gemma3nCausalLM):
    """Gemma 3n that generates through the graph of its backbone.

    A drop-in replacement for `keras_hub.models.Gemma3nCausalLM`. See
    `CausalLM`.

    Differs from upstream, on purpose: what the model returns when it is called
    follows the weights of its embedding. Upstream's goes on with those that it
    was constructed with, whatever is loaded or trained.
    """

    backbone_cls = Gemma3nBackbone

    def turn_end_id(self):
        return self.preprocessor.tokenizer.token_to_id("<end_of_turn>")
