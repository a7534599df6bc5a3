"""What blocks of Gemma 3n are called with, of tokens and their embeddings."""

import types

import keras
from keras_hub.src.models.gemma3n import gemma3n_backbone

from keras_nlp_cache.layers.sharing import share


class OfProcessor(keras.layers.Layer):
    """Computes a part of what one layer of upstream's computes at once.

    That takes token ids and images. Here their embeddings are of layers of the
    graph, which an edit may change, and so is what is made of them.

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

    def get_config(self):
        # All that tells it from others but for layers, which are upstream's.
        return {**super().get_config(), **self.constants}

    def run(self, token_ids, embeddings, images=None, of_text=None, **layers):
        """Runs upstream's code on given embeddings.

        Args:
            token_ids: int tensor `(B, T)`.
            embeddings: Tensor `(B, T, hidden_dim)`.
            images: Optional tensor `(B, N, height, width, 3)`.
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
            {"token_ids": token_ids, "pixel_values": images},
        )


class EmbeddingsOfMedia(OfProcessor):
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


class PerLayerInputs(OfProcessor):
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
