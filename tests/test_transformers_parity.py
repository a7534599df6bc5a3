"""The same random weights give the logits that transformers computes."""

import keras
import numpy as np
import pytest
import torch
import transformers

from keras_nlp_cache import models
from tests.families import compiled
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

COMMON = dict(vocab_size=100, attn_implementation="eager")
LLAMA = dict(
    COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
)
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=32, n_inner=48
    ),
    "gemma": transformers.GemmaConfig(**LLAMA, head_dim=8),
    "gemma2": transformers.Gemma2Config(
        **LLAMA,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "llama": transformers.LlamaConfig(
        **dict(LLAMA, rms_norm_eps=1e-3), tie_word_embeddings=False
    ),
    "llama3": transformers.LlamaConfig(
        **LLAMA,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
}
CLASSES = {"gpt2": "GPT2", "gemma": "Gemma", "gemma2": "Gemma"}


def save_random(name, folder):
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                0.2 * noise if parameter.ndim > 1 else 0.5 + 0.2 * noise
            )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name, tmp_path):
    theirs = save_random(name, tmp_path)
    cls = getattr(models, CLASSES.get(name, "Llama3") + "Backbone")
    backbone = cls.from_preset(str(tmp_path))
    task = getattr(models, CLASSES.get(name, "Llama3") + "CausalLM")
    lm = task(backbone, None)

    token_ids = random_tokens(2, 12)
    mask = padding_mask([12, 7], 12)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(token_ids.astype("int64")),
            attention_mask=torch.tensor(mask),
        ).logits.numpy()
    real = mask.astype(bool)
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    full = to_numpy(compiled(lm)(inputs))
    np.testing.assert_allclose(full[real], expected[real], atol=1e-4, rtol=1e-4)

    cache = backbone.make_cache(2, 12)
    call_with_cache = compiled(lm.call_with_cache)
    logits = []
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        output, _, cache = call_with_cache(
            keras.ops.convert_to_tensor(token_ids[:, start:stop]), cache, start
        )
        logits.append(to_numpy(output))
    logits = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(
        logits[real], expected[real], atol=1e-4, rtol=1e-4
    )
