"""What configurations say is told to a backbone, or refused with words."""

import json

import pytest

from keras_nlp_cache import models
from keras_nlp_cache.files import hugging_face
from tests.families import on_one_backend
from tests.transformers_models import ENCODER_DECODERS
from tests.transformers_models import FAMILIES
from tests.transformers_models import IMAGE_MODELS
from tests.transformers_models import WINDOW

pytestmark = on_one_backend("configurations are read")
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = FAMILIES["gpt_oss"].config.rope_parameters


def config_of(name, **changed):
    # As it is written to a file and read again.
    family = (ENCODER_DECODERS | IMAGE_MODELS | FAMILIES)[name]
    config = json.loads(family.config.to_json_string(use_diff=False))
    return {**config, **changed}


OPT = IMAGE_MODELS["blip2"].config.text_config.to_dict()
T5 = ENCODER_DECODERS["blip2_t5"].config.text_config.to_dict()
REFUSED = [
    (
        "blip2",
        {"text_config": {**OPT, "activation_function": "gelu"}},
        "`activation_function` to be relu",
    ),
    (
        "blip2",
        {"text_config": {**OPT, "word_embed_proj_dim": 16}},
        "`word_embed_proj_dim` to be 32",
    ),
    (
        "blip2",
        {"vision_config": {"hidden_act": "relu"}},
        "`hidden_act` of `vision_config` to be gelu",
    ),
    (
        "blip2_t5",
        {"text_config": {**T5, "feed_forward_proj": "gated-silu"}},
        "`feed_forward_proj` to be gated-gelu",
    ),
    (
        "blip2_t5",
        {"text_config": {**T5, "num_decoder_layers": 3}},
        "`num_decoder_layers` to be 2",
    ),
    ("gpt2", {"layer_norm_epsilon": 1e-6}, "`layer_norm_epsilon` to be 1e-05"),
    ("gemma", {"rms_norm_eps": 1e-5}, "`rms_norm_eps` to be 1e-06"),
    ("gemma", {"attention_bias": True}, "`attention_bias` to be False"),
    ("gemma2", {"query_pre_attn_scalar": 5}, "to be 16 or 8.*Received: 5"),
    ("gemma2", {"layer_types": [FULL, SLIDING]}, "`layer_types` to be"),
    ("gemma3", {"layer_types": [FULL, SLIDING] * 3}, "`layer_types` to be"),
    (
        "gemma3",
        {"layer_types": None, "sliding_window_pattern": 2},
        "`layer_types` to be",
    ),
    (
        "gemma3",
        {"rope_parameters": {SLIDING: {"rope_theta": 5000.0}}},
        "`rope_theta` of `sliding_attention` to be 10000.0",
    ),
    ("gemma3", {"rope_local_base_freq": 5000.0}, "`rope_local_base_freq`"),
    ("gemma3", {"rope_scaling": {"rope_type": "yarn"}}, "`rope_type` to be"),
    (
        "gpt_oss",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}},
        "`original_max_position_embeddings` to be 4096",
    ),
    ("gpt_oss", {"layer_types": [FULL, SLIDING]}, "`layer_types` to be"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "`swiglu_limit` to be 7.0"),
    ("llama", {"attention_bias": True}, "`attention_bias` to be False"),
    ("llama", {"mlp_bias": True}, "`mlp_bias` to be False"),
    ("mistral", {"tie_word_embeddings": True}, "`tie_word_embeddings` to be"),
    ("mixtral", {"rope_parameters": YARN}, "`rope_type` to be default or line"),
    ("qwen", {"layer_types": [FULL, SLIDING]}, "all layers to have the window"),
    (
        "qwen3",
        {"layer_types": None, "max_window_layers": 1},
        "all layers to have the window",
    ),
    ("qwen_moe", {"decoder_sparse_step": 2}, "`decoder_sparse_step` to be 1"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"`mlp_only_layers` to be \[\]"),
    ("smollm3", {"tie_word_embeddings": False}, "`tie_word_embeddings` to be"),
    ("smollm3", {"use_sliding_window": True}, "`use_sliding_window` to be"),
]


@pytest.mark.parametrize("name, changed, message", REFUSED)
def test_what_keras_cannot_compute_is_refused(name, changed, message):
    hugging_face.arguments(config_of(name))
    with pytest.raises(ValueError, match=message):
        hugging_face.arguments(config_of(name, **changed))


def test_that_is_refused_by_from_preset(tmp_path):
    config = config_of("llama", attention_bias=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Choose another preset"):
        models.Llama3Backbone.from_preset(str(tmp_path), load_weights=False)


@pytest.mark.parametrize(
    "name, changed, expected",
    [
        ("llama", {}, {"layer_norm_epsilon": 1e-3}),
        ("gpt2", {}, {"intermediate_dim": 48}),
        ("qwen", {}, {"use_sliding_window_attention": True}),
        # As Transformers 4 wrote it.
        (
            "qwen",
            {"use_sliding_window": False, "layer_types": None},
            {"use_sliding_window_attention": False},
        ),
        (
            "qwen_moe",
            {"layer_types": None, "max_window_layers": 0},
            {"use_sliding_window_attention": False},
        ),
        ("qwen3", {"layer_types": None}, {"sliding_window_size": WINDOW}),
        (
            "qwen3_moe",
            {"use_sliding_window": False},
            {"sliding_window_size": None},
        ),
        ("mistral", {"rms_norm_eps": 1e-5}, {"rope_scaling_factor": 4.0}),
        ("smollm3", {}, {}),
    ],
)
def test_what_is_told(name, changed, expected):
    told = hugging_face.arguments(config_of(name, **changed))
    assert {**told, **expected} == told


def test_epsilons_in_single_precision():
    hugging_face.arguments(config_of("gemma", rms_norm_eps=9.9999999747e-07))
