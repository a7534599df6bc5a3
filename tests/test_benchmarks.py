"""The benchmark: what llama.cpp is given, and what must agree before times."""

import json

import gguf
import numpy as np
import pytest
import torch

from benchmarks import gguf_file
from benchmarks import kinds
from benchmarks import models
from benchmarks import perplexities
from benchmarks import running
from benchmarks.running import EXACT
from benchmarks.running import Precision
from benchmarks.systems.base import System
from keras_nlp_cache.files import gguf_reader
from keras_nlp_cache.files.gguf_preset import architectures
from tests import gguf_files
from tests.families import on_one_backend

pytestmark = on_one_backend("what has no backend is tried")

UNSCALED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CHANGES = {
    "gemma3": {"rope_parameters": UNSCALED},
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}
# What is said in other words, or not at all.
UNCOMPARED = {"architectures", "dtype", "model_type", "rope_scaling"}


@pytest.mark.parametrize("name", ["gpt2", "gemma", "gemma3", "llama"])
def test_a_file_for_llama_cpp_is_the_model(name, tmp_path):
    model = gguf_files.random_model(name, **CHANGES.get(name, {}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.gguf"
    gguf_file.write(path, tmp_path, "float32", "none")
    found = architectures.Model(path, gguf_reader.read(path))
    tensors = {x.name: torch.tensor(x.read().copy()) for x in found.tensors}
    expected = model.state_dict()
    assert {*expected} - {*tensors} <= {"lm_head.weight"}
    for key, x in tensors.items():
        torch.testing.assert_close(x, expected[key], rtol=0, atol=1e-6)
    expected = model.config.to_dict()
    if name == "llama":
        expected["rope_theta"] = 5e5
    for key in (found.config.keys() & expected.keys()) - UNCOMPARED:
        if not isinstance(expected[key], dict):
            expected[key] = pytest.approx(expected[key])
        assert found.config[key] == expected[key], key


@pytest.mark.parametrize(
    "precision, stored",
    [
        (("float16", "none"), "F16"),
        (("bfloat16", "none"), "BF16"),
        (("float32", "int8"), "Q8_0"),
        (("bfloat16", "int4"), "Q4_0"),
    ],
)
def test_all_matrices_are_as_precise(precision, stored, tmp_path):
    gguf_files.random_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.gguf"
    gguf_file.write(path, tmp_path, *precision)
    types = {
        len(x.shape): x.tensor_type.name for x in gguf.GGUFReader(path).tensors
    }
    assert types == {1: "F32", 2: stored}


def test_what_llama_cpp_is_not_given(tmp_path):
    gguf_files.random_model("llama3").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="not scaled.*'llama3'"):
        gguf_file.write(tmp_path / "x.gguf", tmp_path, "float32", "none")
    gguf_files.random_model("gemma2").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="Received: 'gemma2'"):
        gguf_file.write(tmp_path / "x.gguf", tmp_path, "float32", "none")


class FakeWorker:
    tie = 1e-3

    def __init__(self, precision, gap=0.0, agrees=True):
        self.precision, self.agrees = precision, agrees
        self.gap = gap
        self.asked = []

    def ask(self, method, **request):
        self.asked.append(request)
        return {"gap": self.gap}


def test_tokens_must_agree_in_float32():
    workers = {"ours-jax": FakeWorker(EXACT), "other": FakeWorker(EXACT)}
    answers = {
        "ours-jax": {"tokens": [[5, 6, 7], [1, 2, 3]]},
        "other": {"tokens": [[5, 8, 9], [1, 2, 3]]},
    }
    prompt = {"token_ids": [[3], [4]], "source": [[1], [2]]}
    found = running.check_tokens(answers, workers, prompt)
    assert found == {"ties": 1, "differing_rows": {}}
    (question,) = workers["ours-jax"].asked
    assert question == {
        "prompt": {"token_ids": [[3]], "source": [[1]]},
        "after": [5],
        "candidates": [6, 8],
    }
    workers["ours-jax"].gap = 0.1
    with pytest.raises(SystemExit, match=r"ours-jax and other .* row 0.*0\.1"):
        running.check_tokens(answers, workers, prompt)


def test_tokens_may_differ_where_numbers_are_rounded():
    int8 = Precision("float32", "int8")
    workers = {
        "ours-jax": FakeWorker(EXACT),
        "ours-jax int8": FakeWorker(int8, gap=9.0),
        "other int8": FakeWorker(int8, gap=9.0),
    }
    answers = {
        "ours-jax": {"tokens": [[5, 6]]},
        "ours-jax int8": {"tokens": [[5, 7]]},
        "other int8": {"tokens": [[5, 8]]},
    }
    found = running.check_tokens(answers, workers, {"token_ids": [[3]]})
    assert found == {"ties": 0, "differing_rows": {"int8": 1}}


def test_tokens_differ_where_a_system_is_known_to_go_on_otherwise():
    workers = {
        "keras_hub-jax": FakeWorker(EXACT, gap=9.0, agrees=False),
        "ours-jax": FakeWorker(EXACT, gap=9.0),
        "keras_hub-torch": FakeWorker(EXACT, gap=9.0, agrees=False),
        "transformers": FakeWorker(EXACT, gap=9.0),
    }
    answers = {
        "keras_hub-jax": {"tokens": [[5, 7]]},
        "ours-jax": {"tokens": [[5, 6]]},
        "keras_hub-torch": {"tokens": [[5, 7]]},
        "transformers": {"tokens": [[5, 6]]},
    }
    found = running.check_tokens(answers, workers, {"token_ids": [[3]]})
    assert found == {"ties": 0, "differing_rows": {"keras_hub-torch": 1}}
    answers["transformers"]["tokens"] = [[5, 7]]
    with pytest.raises(SystemExit, match="ours-jax and transformers differ"):
        running.check_tokens(answers, workers, {"token_ids": [[3]]})


def test_slots_of_a_model_with_states(tmp_path):
    config = {
        "model_type": "qwen3_5",
        "text_config": {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "head_dim": 16,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = models.cache_bytes_per_slot(tmp_path, "float32")
    assert found == 2 * 4 * 1 * 2 * 16
    assert models.model_type(tmp_path) == "qwen3_5"


# For each kind, weights that a step reads, and those of prompts alone.
READ = {
    "gpt2": (["position_embedding/embeddings", "transformer.wpe.weight"], []),
    "bart": (
        [
            "decoder_position_embedding/embeddings",
            "transformer_decoder_layer_0/cross_attention/query/kernel",
            "model.shared.weight",
            "model.decoder.layers.0.encoder_attn.q_proj.weight",
            "lm_head",
        ],
        [
            "encoder_position_embedding/embeddings",
            "transformer_encoder_layer_0/self_attention_layer/query/kernel",
            "transformer_decoder_layer_0/cross_attention/value/kernel",
            "model.encoder.layers.0.fc1.weight",
            "model.decoder.layers.0.encoder_attn.k_proj",
        ],
    ),
    "paligemma": (
        ["decoder_block_0/attention/query/kernel", "lm_head"],
        [
            "image_encoder/encoder_embeddings/embedding_conv/kernel",
            "image_classifier/kernel",
            "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
            "model.multi_modal_projector.linear",
        ],
    ),
}
CONFIGS = {
    "decoder_start_token_id": 2,
    "image_token_index": 50,
    "text_config": {"num_image_tokens": 4},
    "vision_config": {"image_size": 8},
}


@pytest.mark.parametrize("model_type", READ)
def test_what_a_step_reads(model_type, tmp_path):
    config = {"model_type": model_type, **CONFIGS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = kinds.of(tmp_path)
    read, only_for_prompts = READ[model_type]
    names = [(name, name) for name in read + only_for_prompts]
    assert kind.only_in_steps(names) == read


@pytest.mark.parametrize(
    "model_type, shape, slots", [("bart", (2, 1), 6), ("paligemma", (2, 5), 9)]
)
def test_prompts_of_several_parts(model_type, shape, slots, tmp_path):
    config = {"model_type": model_type, **CONFIGS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = kinds.of(tmp_path)
    assert kind.slots(5) == slots
    prompt = kind.read(json.loads(json.dumps(kind.prompt(2, 5))))
    assert prompt["token_ids"].shape == shape
    after = np.array([[7, 8], [7, 8]])
    inputs = kind.for_keras(prompt, after, known=False)
    text = inputs[kind.keras_text]
    np.testing.assert_array_equal(text[:, -2:], after)
    mask = inputs[kind.keras_text.replace("token_ids", "padding_mask")]
    np.testing.assert_array_equal(mask.sum(axis=1), shape[1])
    theirs = kind.for_transformers(prompt, after)[kind.transformers_text]
    np.testing.assert_array_equal(theirs[:, -text.shape[1] :], text)
    with pytest.raises(SystemExit, match=f"rows: .*'{model_type}'"):
        kinds.check_text(tmp_path, "rows")


def test_perplexity():
    class Fake(System):
        def logits(self, prompt, after):
            length = prompt["token_ids"].shape[1] + after.shape[1]
            logits = np.zeros((length, 10), "float32")
            logits[0, 4] = np.log(11)  # Half of the probability.
            return logits + 100

    found = Fake().perplexity([3, 4, 0])
    assert found["perplexity"] == pytest.approx(
        np.sqrt(1 / (11 / 20) * 10), rel=1e-6
    )
    answers = {
        "ours-jax": {"nats_per_token": 2.0},
        "ours-jax int8": {"nats_per_token": 2.0 + np.log(1.01)},
        "other int8": {"nats_per_token": 9.0},
    }
    compared = perplexities.compared(answers)
    assert compared["ours-jax int8"]["worse"] == pytest.approx(0.01)
    assert compared["other int8"]["worse"] == 0
