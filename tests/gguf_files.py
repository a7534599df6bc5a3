"""Small GGUF files, written from models of transformers as llama.cpp does."""

import gguf
import keras_hub
import numpy as np
import sentencepiece
import torch
import transformers

from tests import text

_COMMON = dict(attn_implementation="eager", bos_token_id=1, eos_token_id=2)
_LLAMA = dict(
    _COMMON,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
)
_GEMMA = dict(_LLAMA, head_dim=16, rms_norm_eps=1e-6)
# For each: the config, and whose tokenizer it has.
MODELS = {
    "gpt2": (
        transformers.GPT2Config,
        dict(
            _COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64
        ),
        "GPT2",
    ),
    "gemma": (transformers.GemmaConfig, _GEMMA, "Gemma"),
    "gemma2": (
        transformers.Gemma2Config,
        dict(
            _GEMMA,
            query_pre_attn_scalar=16,
            sliding_window=4,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
        ),
        "Gemma",
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(
            _GEMMA,
            # Five see a window, and one sees all, at scaled positions.
            num_hidden_layers=6,
            query_pre_attn_scalar=16,
            sliding_window=4,
            final_logit_softcapping=10.0,
            rope_parameters=dict(
                full_attention=dict(
                    rope_type="linear", rope_theta=1e6, factor=8.0
                ),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
        "Gemma",
    ),
    "llama": (
        transformers.LlamaConfig,
        dict(_LLAMA, tie_word_embeddings=False),
        "Llama",
    ),
    "llama3": (
        transformers.LlamaConfig,
        dict(
            _LLAMA,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        "Llama3",
    ),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def tokenizer(name):
    """The tokenizer that a model is written with, as keras_hub's."""
    prefix = MODELS[name][2]
    cls = getattr(keras_hub.models, f"{prefix}Tokenizer")
    return cls(**text.tokenizer_arguments(prefix))


def random_model(name, **changes):
    cls, config, _ = MODELS[name]
    size = tokenizer(name).vocabulary_size()
    config = cls(vocab_size=size, **{**config, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                0.2 * noise if parameter.ndim > 1 else 0.5 + 0.2 * noise
            )
    return model


def write(path, name, model=None, quantization="F32", change=None):
    """Writes a model, and returns it.

    Args:
        path: Path of the file.
        name: str, one of `MODELS`.
        model: Defaults to a random one.
        quantization: str. How the matrices are stored.
        change: Optional function that is called with the dictionaries of
            metadata and of tensors, to change them.
    """
    model = model or random_model(name)
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    metadata = {
        f"{architecture}.{key}": value
        for key, value in _metadata(config).items()
    }
    metadata |= _tokenizer_metadata(name)
    tensors = _tensors(model, quantization)
    if getattr(config, "rope_parameters", None) and name == "llama3":
        # transformers computes them, too.
        rope = model.model.rotary_emb
        plain = 500000.0 ** -(np.arange(0, 8, 2) / 8)
        factors = plain / rope.inv_freq.numpy()
        tensors["rope_freqs.weight"] = factors.astype("float32")
    metadata["general.architecture"] = architecture
    if change is not None:
        change(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        _add(writer, key, value)
    for key, x in tensors.items():
        if isinstance(x, tuple):
            x, kind = x
            writer.add_tensor(key, x, raw_dtype=kind)
        else:
            writer.add_tensor(key, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer, key, value):
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _metadata(config):
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        return found | {
            "feed_forward_length": config.n_inner,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.model_type == "llama":
        return found | {
            "vocab_size": config.vocab_size,
            "rope.freq_base": config.rope_parameters["rope_theta"],
            "rope.dimension_count": config.head_dim,
        }
    found |= {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if config.model_type == "gemma2":
        found |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "attention.sliding_window": config.sliding_window,
        }
    if config.model_type == "gemma3_text":
        rope = config.rope_parameters["full_attention"]
        found |= {
            "rope.freq_base": rope["rope_theta"],
            "final_logit_softcapping": config.final_logit_softcapping,
            "attention.sliding_window": config.sliding_window,
        }
        if rope["rope_type"] == "linear":
            found |= {
                "rope.scaling.type": "linear",
                "rope.scaling.factor": rope["factor"],
            }
    return found


def _tokenizer_metadata(name):
    prefix = MODELS[name][2]
    keras_tokenizer = tokenizer(name)
    found = {
        "tokenizer.ggml.bos_token_id": keras_tokenizer.start_token_id,
        "tokenizer.ggml.eos_token_id": keras_tokenizer.end_token_id,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if prefix in ("GPT2", "Llama3"):
        vocabulary = keras_tokenizer.vocabulary
        tokens = sorted(vocabulary, key=vocabulary.get)
        special = ["<|" in token for token in tokens]
        types = [3 if x else 1 for x in special]
        return found | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": keras_tokenizer.merges,
        }
    pieces = sentencepiece.SentencePieceProcessor(
        model_proto=keras_tokenizer.proto
    )
    ids = range(pieces.vocab_size())
    # Newer files call it a control token, as all that stand for no text.
    unknown = 3 if name == "gemma3" else 2
    types = [
        unknown if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 1
        for i in ids
    ]
    found |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in ids],
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
        # The tests' tokenizers were trained so.
        "tokenizer.ggml.add_space_prefix": True,
    }
    if prefix == "Gemma":
        found["tokenizer.ggml.padding_token_id"] = pieces.pad_id()
    return found


def _tensors(model, quantization):
    config = model.config
    architectures = {x: i for i, x in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(
        architectures[config.model_type.removesuffix("_text")],
        config.num_hidden_layers,
    )
    heads = {
        "attn_q.weight": config.num_attention_heads,
        "attn_k.weight": getattr(config, "num_key_value_heads", None),
    }
    kind = gguf.GGMLQuantizationType[quantization]
    found = {}
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        x = x.numpy()
        _, _, role = theirs.rpartition(".blk.")
        if config.model_type == "gpt2" and x.ndim == 2 and ".h." in name:
            x = x.T
        if "gemma" in config.model_type and "norm" in name:
            x = x + 1
        role = theirs.split(".", 2)[-1]
        if config.model_type == "llama" and role in heads:
            pairs = x.reshape(heads[role], 2, -1, x.shape[1])
            x = pairs.swapaxes(1, 2).reshape(x.shape)
        x = np.ascontiguousarray(x)
        if x.ndim > 1 and quantization != "F32":
            x = gguf.quantize(x, kind), kind
        found[theirs] = x
    return found
