"""What a backbone does not find in upstream's layers is an error, not a guess.

Upstream's classes change under us. Where one does, its backbone is refused when
it is constructed, with what was looked for, and computes no wrong numbers.
"""

import keras
import keras_hub
import pytest
from keras_hub.src.models.gemma import gemma_attention
from keras_hub.src.models.gemma3 import gemma3_vision_encoder
from keras_hub.src.models.llama import llama_attention
from keras_hub.src.models.llama import llama_decoder

from keras_nlp_cache import drop_in
from keras_nlp_cache import models
from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.layers.block_call import first_argument
from tests.families import every_family
from tests.families import FAMILIES
from tests.families import on_one_backend

pytestmark = on_one_backend("what is looked for in Python is looked for")
LLAMA = next(x for x in FAMILIES if x.name == "llama")


def upstream_attention(family):
    """The class of upstream's attention layers, and one of ours over it."""
    (attention,) = family.pair[0].blocks[0].remembering()
    return type(attention).__bases__[-1], attention


def first(**kwargs):
    return first_argument((), kwargs)


@pytest.fixture
def after_building(monkeypatch):
    """Has a function called on each layer of a class once it is built."""

    def patch(cls, change):
        build = cls.build

        def changed(self, *args, **kwargs):
            build(self, *args, **kwargs)
            change(self)

        monkeypatch.setattr(cls, "build", changed)

    return patch


@every_family
def test_a_projection_that_was_renamed(family, after_building, monkeypatch):
    if family.name == "rwkv7":
        pytest.skip("no projection is looked for: upstream's code finds all")
    cls, attention = upstream_attention(family)
    name = attention.projections["output"]

    def rename(layer):
        layer.renamed = getattr(layer, name)
        delattr(layer, name)

    after_building(cls, rename)
    # Upstream's code would know the new name.
    monkeypatch.setattr(cls, "call", lambda self, **kwargs: first(**kwargs))
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{name}") as error:
        family.ours("Backbone")(**dict(family.config))
    assert "keras_nlp_cache/models" in str(error.value)


def test_a_scale_that_is_nowhere(after_building):
    def forget(layer):
        layer._inv_norm_factor = None

    after_building(llama_attention.LlamaAttention, forget)
    with pytest.raises(ValueError, match="scale of its logits.*_inv_norm_f"):
        LLAMA.backbone()


def test_rotary_positions_that_are_not_found(after_building):
    def rename(layer):
        layer.turning = layer.rotary_embedding_layer
        del layer.rotary_embedding_layer

    after_building(llama_attention.LlamaAttention, rename)
    with pytest.raises(ValueError, match="rotary.*rotary_embedding_layer"):
        LLAMA.backbone()


def test_a_dropout_that_nobody_spoke_of(after_building):
    def drop(layer):
        layer.another = keras.layers.Dropout(0.5, name="another")

    after_building(gemma_attention.CachedGemmaAttention, drop)
    gemma = next(x for x in FAMILIES if x.name == "gemma")
    with pytest.raises(ValueError, match="'another'.*dropout_of_weights"):
        gemma.backbone()


def test_a_norm_that_nobody_spoke_of(after_building):
    def normalize(layer):
        layer.q_norm = keras.layers.LayerNormalization(name="q_norm")
        layer.q_norm.build((None, None, 4, 8))

    after_building(llama_attention.LlamaAttention, normalize)
    with pytest.raises(ValueError, match="'q_norm'.*query_norm"):
        LLAMA.backbone()


def test_weights_that_nobody_spoke_of(after_building):
    def weigh(layer):
        layer.sinks = layer.add_weight(shape=(4,), name="sinks")

    after_building(llama_attention.LlamaAttention, weigh)
    with pytest.raises(ValueError, match="its own weights.*sink"):
        LLAMA.backbone()


def test_attention_of_another_class(monkeypatch):
    class NewAttention(llama_attention.LlamaAttention):
        pass

    monkeypatch.setattr(llama_decoder, "LlamaAttention", NewAttention)
    with pytest.raises(ValueError, match="a layer that remembers.*NewAtten"):
        LLAMA.backbone()


def test_blocks_of_another_class():
    class Block(llama_decoder.LlamaTransformerDecoder):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "keras_hub.src.models.llama.llama_backbone.LlamaTransformerDecoder",
            Block,
        )
        with pytest.raises(ValueError, match="this package knows.*'Block'"):
            LLAMA.backbone()


def test_learned_positions_that_cannot_be_told(monkeypatch):
    embedding = keras_hub.layers.PositionEmbedding

    class Positions(keras.layers.Layer):
        def __init__(self, sequence_length, name, **kwargs):
            super().__init__(name=name)
            self.inner = embedding(sequence_length)

        def build(self, input_shape):
            self.inner.build(input_shape)

        def call(self, x):
            return self.inner(x)

        def compute_output_shape(self, input_shape):
            return input_shape

    module = "keras_hub.src.models.gpt2.gpt2_backbone.PositionEmbedding"
    monkeypatch.setattr(module, Positions)
    gpt2 = next(x for x in FAMILIES if x.name == "gpt2")
    with pytest.raises(ValueError, match="learned positions.*`positions`"):
        gpt2.backbone()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            dict(
                is_embedding_model=True,
                embedding_dim=8,
                pooling_intermediate_dim=8,
            ),
            "returns hidden states.*pooled_output",
        ),
        (dict(use_bidirectional_attention=True), "Attention to what follows"),
    ],
)
def test_a_gemma_3_of_another_kind(arguments, words):
    gemma3 = next(x for x in FAMILIES if x.name == "gemma3")
    with pytest.raises(ValueError, match=words):
        gemma3.backbone(**arguments)


def test_a_gemma_3_that_sees():
    gemma3 = next(x for x in FAMILIES if x.name == "gemma3")
    vision = gemma3_vision_encoder.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=4,
        num_layers=1,
        num_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        output_dim=32,
    )
    assert gemma3.backbone(vision_encoder=vision).sees
    with pytest.raises(ValueError, match="returns hidden states.*pooled_"):
        gemma3.backbone(
            vision_encoder=vision,
            is_embedding_model=True,
            embedding_dim=8,
            pooling_intermediate_dim=8,
        )


def test_every_attention_layer_is_found_by_its_class():
    ours = [
        cls
        for cls in drop_in.replacements()
        if issubclass(cls, CachedAttention)
    ]
    # Llama 3 has that of Llama, OPT, BLIP-2 and BART that of GPT-2, PaliGemma
    # that of Gemma, and Qwen 3.5 MoE that of Qwen 3.5. RWKV-7 has none.
    covered = [x for x in models.__all__ if x.endswith("Backbone")]
    assert len(ours) == len(covered) - 7
