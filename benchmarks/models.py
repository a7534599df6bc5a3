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
    """Eight of the layers of Qwen 3.5 0.8B, with random weights, fewer words.

    With all 24, neither ours nor keras_hub's was measured in five minutes.
    """
    import transformers

    config = transformers.Qwen3_5TextConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
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
    text = _config(folder)
    # As of a model that could see, as keras_hub wants it.
    kept = ("architectures", "dtype", "tie_word_embeddings")
    config = {
        **{name: text[name] for name in kept},
        "model_type": "qwen3_5",
        "text_config": text,
    }
    _rewrite(folder, config, "model.", "model.language_model.")
    return folder


def bart(folder):
    """The shape of BART base, with random weights.

    They are larger than those that training starts from, with which its decoder
    would say its first token again and again, whatever the encoder read.
    """
    import transformers

    config = transformers.BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        init_std=0.03,
        forced_eos_token_id=None,
    )
    _random(folder, config, "BartForConditionalGeneration")
    # keras_hub reads what transformers 5 does not write.
    layers = config.encoder_layers
    _rewrite(folder, {**_config(folder), "num_hidden_layers": layers})
    return folder


def paligemma(folder):
    """A small PaliGemma with random weights, 256 tokens for an image.

    They are larger than those that training starts from, as in `bart()`.
    """
    import transformers

    config = transformers.PaliGemmaConfig(
        text_config=dict(
            model_type="gemma",
            # keras_hub has no embedding of the last one, that of images.
            vocab_size=32_001,
            hidden_size=768,
            intermediate_size=4096,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=1,
            initializer_range=0.04,
            # keras_hub takes the number of tokens of an image for it.
            head_dim=256,
        ),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=224,
            patch_size=14,
            projection_dim=768,
            vision_use_head=False,
        ),
        image_token_id=32_000,
        projection_dim=768,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    _random(folder, config, "PaliGemmaForConditionalGeneration")
    # keras_hub reads what transformers 5 calls otherwise.
    _rewrite(
        folder, _config(folder), "vision_tower.", "vision_tower.vision_model."
    )
    return folder


def _config(folder):
    return json.loads((pathlib.Path(folder) / "config.json").read_text())


def _rewrite(folder, config, old="", new=""):
    """Has a directory say other things, and tensors have other names."""
    import safetensors.torch

    (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
    if not old:
        return
    path = pathlib.Path(folder) / "model.safetensors"
    tensors = {
        name.replace(old, new, 1): x
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
    """Bytes of keys and values that one token adds to a cache.

    Whether the decoder or the encoder has read it.
    """
    config = _config(preset)
    config = config.get("text_config", config)
    layers = _first(config, "num_hidden_layers", "n_layer")
    # What keeps a state keeps nothing of a token.
    layers -= config.get("layer_types", []).count("linear_attention")
    heads = _first(
        config, "num_attention_heads", "decoder_attention_heads", "n_head"
    )
    width = _first(config, "hidden_size", "d_model", "n_embd")
    head_dim = config.get("head_dim") or width // heads
    heads = config.get("num_key_value_heads", heads)
    return 2 * itemsize(dtype) * layers * heads * head_dim


def model_type(preset):
    """What transformers calls a kind of model."""
    return _config(preset)["model_type"]


def _first(config, *names):
    return next(config[x] for x in names if x in config)


MODELS = {
    f.__name__: f
    for f in (
        *(gpt2, smollm2, gemma, qwen3, qwen3_5, gemma3, mixtral),
        *(bart, paligemma),
    )
}
