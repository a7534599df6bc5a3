"""A block whose two attention layers have an entry in the cache each."""

import keras_hub
import numpy as np
import pytest
from keras.src.saving import object_registration
from keras_hub.src.models.llama import llama_attention
from keras_hub.src.models.llama import llama_backbone
from keras_hub.src.models.llama import llama_decoder

import keras_nlp_cache
from keras_nlp_cache import drop_in
from keras_nlp_cache import surgery
from keras_nlp_cache.blocks.decoder_block import decoder_block
from tests.edits import cached_forward
from tests.edits import dense
from tests.edits import full_forward
from tests.edits import LENGTH
from tests.edits import TOKENS
from tests.families import assert_greedy_after
from tests.families import FAMILIES
from tests.families import padding_mask
from tests.families import to_numpy

(LLAMA,) = [x for x in FAMILIES if x.name == "llama"]
PROMPTS = {
    "token_ids": TOKENS * padding_mask([3, 5], LENGTH),
    "padding_mask": padding_mask([3, 5], LENGTH),
}


class TwoAttentionsDecoder(llama_decoder.LlamaTransformerDecoder):
    """A block as upstream might write it, with attention at its end, too."""

    def build(self, decoder_sequence_shape):
        super().build(decoder_sequence_shape)
        self._second_attention_layer = llama_attention.LlamaAttention(
            num_query_heads=self.num_query_heads,
            num_key_value_heads=self.num_query_heads,
            dtype=self.dtype_policy,
            name="second_attention",
        )
        self._second_attention_layer.build(decoder_sequence_shape)

    def call(
        self,
        decoder_sequence,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
        training=None,
    ):
        x = super().call(
            decoder_sequence,
            decoder_padding_mask=decoder_padding_mask,
            decoder_attention_mask=decoder_attention_mask,
        )
        mask = self._compute_self_attention_mask(
            decoder_sequence=decoder_sequence,
            decoder_padding_mask=decoder_padding_mask,
            decoder_attention_mask=decoder_attention_mask,
            self_attention_cache=None,
            self_attention_cache_update_index=None,
        )
        return x + self._second_attention_layer(x, attention_mask=mask)


@pytest.fixture
def lm(monkeypatch):
    """A Llama of two such blocks. Nothing of them is known afterwards."""
    cls = decoder_block(TwoAttentionsDecoder)
    monkeypatch.setattr(
        llama_backbone, "LlamaTransformerDecoder", TwoAttentionsDecoder
    )
    yield LLAMA.task(backbone=LLAMA.backbone(), preprocessor=None)
    del drop_in._replacements[TwoAttentionsDecoder]
    name = object_registration.GLOBAL_CUSTOM_NAMES.pop(cls)
    del object_registration.GLOBAL_CUSTOM_OBJECTS[name]


def assert_sound(lm, blocks):
    """It has two entries for each block, and is the same with its cache."""
    backbone = lm.backbone
    assert backbone.cache_spec == ((2, 8), (4, 8)) * blocks
    assert len(backbone.blocks) == blocks
    assert [x.block for x in backbone.sites if x.block is not None] == list(
        range(blocks)
    )
    full = full_forward(backbone)
    np.testing.assert_allclose(
        cached_forward(backbone), full, atol=1e-4, rtol=1e-3
    )
    return full


def test_two_entries(lm, tmp_path):
    assert isinstance(lm, keras_hub.models.LlamaCausalLM)
    full = assert_sound(lm, 2)
    _, cache = lm.backbone(
        {
            "token_ids": TOKENS,
            "cache": lm.backbone.make_cache(2, LENGTH),
            "cache_update_index": 0,
        }
    )
    assert all(np.abs(to_numpy(x)).max() > 1e-3 for pair in cache for x in pair)

    edited = surgery.repeat_blocks(lm, 1)
    edited = surgery.add_lora(edited, 0, 2)
    edited = surgery.ablate_heads(edited, 2, 0)
    edited = surgery.insert_after(edited, ["block.1.residual", 0], dense)
    edited = surgery.insert_after(edited, -1, lm.backbone.blocks[0])
    edited = surgery.tap(edited, ["block.1.feedforward", 2])
    changed = assert_sound(edited, 4)
    assert np.abs(changed - full).max() > 1e-2
    edited.compile(sampler="greedy")
    generated = edited.generate(PROMPTS, stop_token_ids=None)
    assert_greedy_after(PROMPTS, generated["token_ids"], edited)
    edited.save(tmp_path / "edited.keras")
    loaded = keras_nlp_cache.load_model(tmp_path / "edited.keras")
    assert loaded.backbone.taps == edited.backbone.taps
    np.testing.assert_allclose(
        full_forward(loaded.backbone), changed, atol=1e-5
    )
    again = surgery.remove(loaded, [0, -1])
    assert again.backbone.cache_spec == lm.backbone.cache_spec
