"""The models that are compared, as Hugging Face directories."""

import json
import pathlib

from benchmarks.systems.base import itemsize


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


def qwen3(folder):
    """The shape of Qwen 3 0.6B, with random weights and fewer words."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return _random(folder, config, "Qwen3ForCausalLM")


def gemma3(folder):
    """The shape of Gemma 3 270M, with random weights."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
    )
    return _random(folder, config, "Gemma3ForCausalLM")


def mixtral(folder):
    """A small mixture of experts with random weights, two of eight chosen."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return _random(folder, config, "MixtralForCausalLM")


def qwen3_5(folder):
    """The shape of Qwen 3.5 0.8B, with random weights and fewer words."""
    import transformers

    config = transformers.Qwen3_5TextConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    _random(folder, config, "Qwen3_5ForCausalLM")
    _as_of_several_media(folder, "qwen3_5")
    return folder


def _as_of_several_media(folder, model_type):
    """Has a model of text look like one that could see, as keras_hub wants."""
    import safetensors.torch

    folder = pathlib.Path(folder)
    text = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": text["architectures"],
        "dtype": text["dtype"],
        "model_type": model_type,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
    }
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    tensors = {
        name.replace("model.", "model.language_model.", 1): x
        for name, x in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _random(folder, config, name):
    import torch
    import transformers

    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def cache_bytes_per_slot(preset, dtype):
    """Bytes of keys and values that one token adds to a cache."""
    config = json.loads((pathlib.Path(preset) / "config.json").read_text())
    config = config.get("text_config", config)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    # What keeps a state keeps nothing of a token.
    layers -= config.get("layer_types", []).count("linear_attention")
    heads = config.get("num_attention_heads") or config["n_head"]
    width = config.get("hidden_size") or config["n_embd"]
    head_dim = config.get("head_dim") or width // heads
    heads = config.get("num_key_value_heads", heads)
    return 2 * itemsize(dtype) * layers * heads * head_dim


def model_type(preset):
    """What transformers calls a kind of model."""
    config = json.loads((pathlib.Path(preset) / "config.json").read_text())
    return config["model_type"]


MODELS = {
    f.__name__: f
    for f in (gpt2, smollm2, gemma, qwen3, qwen3_5, gemma3, mixtral)
}
