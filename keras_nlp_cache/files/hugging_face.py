"""What configurations of Hugging Face say that upstream's converters pass over.

Upstream would compute another model without a word. Here, what its backbones
can be told is told, and what is built into them is compared.
"""

# What is built into upstream's backbones, or into what reads their weights, by
# the type of model. Where a key is missing, it says the first of these.
_NO_BIAS = {"attention_bias": (False,)}
_ALL_SPARSE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
_BUILT_IN = {
    "gpt2": {"layer_norm_epsilon": (1e-5,)},
    "gemma": {"rms_norm_eps": (1e-6,), **_NO_BIAS},
    "gemma2": {"rms_norm_eps": (1e-6,), **_NO_BIAS},
    "gemma3_text": _NO_BIAS,
    "gemma4_text": {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": ("vision",),
        **_NO_BIAS,
    },
    "gpt_oss": {
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
    },
    "llama": {"mlp_bias": (False,), **_NO_BIAS},
    "mistral": {"tie_word_embeddings": (False,)},
    "mixtral": {"tie_word_embeddings": (False,)},
    "opt": {
        "activation_function": ("relu",),
        "do_layer_norm_before": (True,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
        "_remove_final_layer_norm": (False,),
        "tie_word_embeddings": (True,),
    },
    "qwen2_moe": {
        **_ALL_SPARSE,
        "qkv_bias": (True,),
        "tie_word_embeddings": (False,),
    },
    "qwen3": _NO_BIAS,
    "qwen3_moe": {**_ALL_SPARSE, **_NO_BIAS},
    "t5": {
        "feed_forward_proj": ("gated-gelu",),
        "relative_attention_num_buckets": (32,),
        "relative_attention_max_distance": (128,),
    },
    "smollm3": {
        "mlp_bias": (False,),
        "tie_word_embeddings": (True,),
        "use_sliding_window": (False,),
        **_NO_BIAS,
    },
}
# How positions can be scaled. Not for those that upstream's converters check.
_ROPE_TYPES = {
    "gemma": (),
    "gemma2": (),
    "gpt_oss": ("yarn",),
    "mistral": ("linear",),
    "mixtral": ("linear",),
    "qwen2": ("linear",),
    "qwen2_moe": ("linear",),
    "qwen3": ("linear",),
    "qwen3_moe": ("linear",),
    "smollm3": (),
}
# How gpt-oss scales them.
_YARN = {
    "beta_fast": (32.0,),
    "beta_slow": (1.0,),
    "original_max_position_embeddings": (4096,),
    "truncate": (False,),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Gemma 3: the base of positions in each kind of layer.
_BASES = {_SLIDING: (10_000.0,), _FULL: (1_000_000.0,)}


def arguments(config):
    """Arguments of a backbone that upstream's converter leaves out.

    Args:
        config: Dictionary, what `config.json` says. Changed in place, to what
            upstream's converter expects, where that is only another name.

    Returns:
        A dictionary.

    Raises:
        ValueError: If upstream's backbone cannot compute such a model.
    """
    kind = config["model_type"]
    text = config.get("text_config", config)
    for key, expected in _BUILT_IN.get(text.get("model_type"), {}).items():
        _check(text, key, expected)
    if kind.startswith("gemma"):
        _check_gemma(text)
    if kind in ("gemma4", "gemma4_text"):
        _name_as_upstream(text)
    if kind in ("gemma2", "gpt_oss"):
        _check(config, "layer_types", (_windows_but_each(2, config),))
    if "output_router_logits" in config:
        # They are for training, and in the way of everything else.
        config["output_router_logits"] = False
    told = _scaled_positions(config)
    if kind == "paligemma":
        _check(text, "model_type", ("gemma",))
        # Upstream's takes the number of image tokens for it.
        told["head_dim"] = text.get("head_dim") or 256
    if kind == "gemma3" and "vision_config" in config:
        vision = config["vision_config"]
        # Of what the tower returns, upstream's converter makes one of 16.
        side = vision["image_size"] // vision["patch_size"] // 4
        _check(config, "mm_tokens_per_image", (side**2,))
    if kind == "blip-2":
        _check_blip2(config, text)
    if kind.startswith("qwen"):
        told.update(_qwen(config))
    for model_type, key, name in (
        ("gpt2", "n_inner", "intermediate_dim"),
        ("llama", "rms_norm_eps", "layer_norm_epsilon"),
    ):
        if kind == model_type and config.get(key) is not None:
            told[name] = config[key]
    return told


def _check_blip2(config, text):
    for name, key, expected in (
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "qkv_bias", True),
        ("qformer_config", "hidden_act", "gelu"),
        ("qformer_config", "use_qformer_text_input", False),
    ):
        _check(config[name], key, (expected,), f" of `{name}`")
    if text.get("model_type") == "opt":
        _check(text, "word_embed_proj_dim", (text["hidden_size"],))
    if text.get("model_type") == "t5":
        _check(text, "num_decoder_layers", (text["num_layers"],))


def _check(config, key, expected, where=""):
    """Raises a `ValueError` for what differs from what is built in."""
    value = config.get(key)
    if value is None or value in expected:
        return
    if isinstance(value, float) and any(
        # Some files have it in single precision.
        abs(value - x) <= 1e-6 * x
        for x in expected
    ):
        return
    raise ValueError(
        f"Expected `{key}`{where} to be "
        f"{' or '.join(str(x) for x in expected)}, which Keras has built into "
        f"{config.get('model_type', 'such')} models. Received: {value}. Choose "
        "another preset."
    )


def _windows_but_each(number, config):
    """Kinds of layers, all of which but each so-many-th slide a window."""
    count = config["num_hidden_layers"]
    return [_SLIDING if (i + 1) % number else _FULL for i in range(count)]


def _scaled_positions(config):
    """What there is to say of how positions are scaled.

    Transformers 5 calls it otherwise than upstream's converters.
    """
    kind = config["model_type"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return {}
    if kind in ("llama", "gpt_oss"):
        config["rope_scaling"] = rope
    if kind not in _ROPE_TYPES:
        return {}
    _check(
        {"rope_type": rope_type, "model_type": kind},
        "rope_type",
        ("default", *_ROPE_TYPES[kind]),
    )
    if rope_type == "yarn":
        for key, expected in _YARN.items():
            _check({**rope, "model_type": kind}, key, expected)
        return {}
    return {"rope_scaling_factor": rope["factor"]}


# === Gemma ===


def _check_gemma(config):
    if "query_pre_attn_scalar" in config and "head_dim" in config:
        for_each_head = config["hidden_size"] // config["num_attention_heads"]
        _check(
            config,
            "query_pre_attn_scalar",
            (config["head_dim"], for_each_head),
        )
    if not config.get("model_type", "gemma3").startswith("gemma3"):
        return
    usual, none = (_windows_but_each(x, config) for x in (6, 1))
    size = config.get("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or _windows_but_each(size, config)
    _check({**config, "layer_types": kinds}, "layer_types", (usual, none))
    rope = config.get("rope_parameters") or {}
    for kind, key in (
        (_SLIDING, "rope_local_base_freq"),
        (_FULL, "rope_theta"),
    ):
        _check(config, key, _BASES[kind])
        parameters = rope.get(kind) or {}
        _check(parameters, "rope_theta", _BASES[kind], f" of `{kind}`")
        _check(parameters, "rope_type", ("default", "linear"), f" of `{kind}`")
    _check(config.get("rope_scaling") or {}, "rope_type", ("linear", "default"))


def _name_as_upstream(config):
    """Says of layers of Gemma 4 that see all of a text what Keras reads of it.

    Transformers 5 has something to say of each layer in the place of that.
    """
    full = [i for i, x in enumerate(config["layer_types"]) if x == _FULL]
    layers = config.get("per_layer_config")
    if layers is not None:
        said = {int(i): x for i, x in layers.items()}
        one = said.get(full[0], {}) if full else {}
        _check(
            {**config, "per_layer_config": said},
            "per_layer_config",
            (dict.fromkeys(full, one) if one else {},),
        )
        config["global_head_dim"] = one.get("head_dim", config["head_dim"])
        config["num_global_key_value_heads"] = one.get("num_key_value_heads")
    config.setdefault("global_head_dim", 512)
    # By these, Keras knows that keys are values.
    heads = config.get("num_global_key_value_heads")
    if not config.get("attention_k_eq_v"):
        config["num_global_key_value_heads"] = None
    elif heads is None:
        config["num_global_key_value_heads"] = config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {}
    for kind, types in (
        (_SLIDING, ("default",)),
        (_FULL, ("proportional", "default")),
    ):
        parameters = rope.setdefault(kind, {})
        _check(parameters, "rope_type", types, f" of `{kind}`")
    rope[_FULL].setdefault("partial_rotary_factor", 1.0)
    config["rope_parameters"] = rope


# === Qwen ===


def _qwen(config):
    kind = config["model_type"]
    window = _qwen_window(config)
    if kind in ("qwen2", "qwen2_moe"):
        told = {"use_sliding_window_attention": window is not None}
    else:
        told = {"sliding_window_size": window}
    if kind == "qwen3_moe":
        # What Transformers 5 calls it.
        config.setdefault("num_experts", config.get("num_local_experts"))
    return told


def _qwen_window(config):
    """How far all layers see, or `None`."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window") or not window:
        return None
    kind, count = config["model_type"], config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None:
        # What layers do if that is not said for each.
        first = config.get("max_window_layers", 28)
        slides = {
            "qwen2_moe": lambda i: i % 2 == 0 and i < first,
            "qwen3_moe": lambda i: True,
        }.get(kind, lambda i: i >= first)
        kinds = [_SLIDING if slides(i) else _FULL for i in range(count)]
    if len(set(kinds)) > 1:
        raise ValueError(
            "Expected all layers to have the window of `sliding_window`, or "
            f"none, as in all {kind} models of Keras. Received: {kinds}. "
            "Choose another preset."
        )
    return window if kinds[0] == _SLIDING else None
