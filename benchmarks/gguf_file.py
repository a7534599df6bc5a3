"""A model of the benchmark as a GGUF file, for llama.cpp.

It has no vocabulary, since systems are given token ids. All matrices are of one
type, the embeddings as well, as Keras quantizes them, too: what llama.cpp calls
`--pure`.
"""

import json
import pathlib

# How llama.cpp stores what Keras quantizes, whatever it computes with.
QUANTIZED = {
    "int8": "Q8_0",
    "int8-weights": "Q8_0",
    "int4": "Q4_0",
    "int4-32": "Q4_0",
}
# What GGUF calls the types of models that Hugging Face has.
_ARCHITECTURES = {
    "gpt2": "GPT2",
    "llama": "LLAMA",
    "gemma": "GEMMA",
    "gemma3_text": "GEMMA3",
    "qwen3": "QWEN3",
}
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def type_name(dtype, quantize):
    """The type of GGUF that is as precise, by its name."""
    return FLOATS[dtype] if quantize == "none" else QUANTIZED[quantize]


def write(path, preset, dtype, quantize):
    """Writes a Hugging Face directory as a GGUF file.

    Args:
        path: Path of the file.
        preset: Path of the directory.
        dtype: str, one of `FLOATS`.
        quantize: str, one of `QUANTIZED`, or `"none"`.

    Raises:
        SystemExit: If it is of a model that is not known here.
    """
    import gguf

    preset = pathlib.Path(preset)
    config = json.loads((preset / "config.json").read_text())
    if config["model_type"] not in _ARCHITECTURES:
        raise SystemExit(
            f"llama_cpp: expected a model of {list(_ARCHITECTURES)}, which "
            "`benchmarks.gguf_file` can write. Received: "
            f"{config['model_type']!r}. Leave it out of --systems."
        )
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config["model_type"]]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, config)
    names = gguf.get_tensor_name_map(architecture, _layers(config))
    stored = gguf.GGMLQuantizationType[type_name(dtype, quantize)]
    for name, x in _tensors(preset):
        theirs = _their_name(names, name)
        if theirs == "output.weight" and config.get("tie_word_embeddings"):
            continue
        x = _laid_out(theirs, x.astype("float32"), config)
        kind = gguf.GGMLQuantizationType.F32
        if x.ndim > 1 and theirs != "position_embd.weight":
            x, kind = gguf.quants.quantize(x, stored), stored
        writer.add_tensor(theirs, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(preset):
    import safetensors

    for path in sorted(preset.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _their_name(names, name):
    theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
        raise SystemExit(
            f"llama_cpp: GGUF has no name for the tensor {name!r}."
        )
    return theirs


def _layers(config):
    return config.get("num_hidden_layers") or config["n_layer"]


def _add_metadata(writer, config):
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(_layers(config))
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(
            config.get("n_inner") or 4 * config["n_embd"]
        )
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_rope_theta(config))
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])


def _head_dim(config):
    heads = config["num_attention_heads"]
    return config.get("head_dim") or config["hidden_size"] // heads


def _rope_theta(config):
    """Where either release of transformers has written it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(
            "llama_cpp: expected positions that are not scaled. Received: "
            f"{rope}. Leave it out of --systems."
        )
    return rope.get("rope_theta") or config["rope_theta"]


def _laid_out(theirs, x, config):
    """A tensor as llama.cpp has it."""
    role = theirs.split(".", 2)[-1]
    if config["model_type"] == "gpt2" and x.ndim == 2 and "blk." in theirs:
        x = x.T
    if config["model_type"].startswith("gemma") and "norm" in theirs:
        x = x + 1
    heads = {
        "attn_q.weight": "num_attention_heads",
        "attn_k.weight": "num_key_value_heads",
    }
    if config["model_type"] == "llama" and role in heads:
        # Of rotary pairs, one half follows the other in Hugging Face's files.
        halves = x.reshape(config[heads[role]], 2, -1, x.shape[1])
        x = halves.swapaxes(1, 2).reshape(x.shape)
    return x.copy(order="C")
