"""The models that are compared, as Hugging Face directories."""

import json
import pathlib


def gpt2(folder):
    """GPT-2 base with random weights."""
    import transformers

    return _random(folder, transformers.GPT2Config(), "GPT2LMHeadModel")


def smollm2(folder):
    """SmolLM2-135M-Instruct, with its own weights."""
    from keras_nlp_cache import default_model

    return default_model.preset()


def gemma(folder):
    """A small Gemma with random weights: one key/value head, wide heads."""
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    return _random(folder, config, "GemmaForCausalLM")


def _random(folder, config, name):
    import torch
    import transformers

    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def cache_bytes_per_slot(preset):
    """Bytes of float32 keys and values that one token adds to a cache."""
    config = json.loads((pathlib.Path(preset) / "config.json").read_text())
    layers = config.get("num_hidden_layers") or config["n_layer"]
    heads = config.get("num_attention_heads") or config["n_head"]
    width = config.get("hidden_size") or config["n_embd"]
    head_dim = config.get("head_dim") or width // heads
    return 2 * 4 * layers * head_dim * config.get("num_key_value_heads", heads)


MODELS = {f.__name__: f for f in (gpt2, smollm2, gemma)}
