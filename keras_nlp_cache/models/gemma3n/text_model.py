"""The embeddings of Gemma 3n, and the logits that are made with them."""

import keras
from keras_hub.src.models.gemma3n import gemma3n_text_layers
from keras_hub.src.models.gemma3n import gemma3n_text_model

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.layers.specializing import give_class
from keras_nlp_cache.layers.specializing import Specialized


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
