"""What the architectures that we read call things in GGUF and Hugging Face.

Whatever a file says must be understood: a key or a tensor that is not known
here is refused, since a model without it would be another one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from keras_nlp_cache.files.gguf_preset import stored

_REQUIRED = object()
# What changes nothing, whatever it says.
_IRRELEVANT = ("vocab_size", "tensor_data_layout", "attention.causal")


class Model:
    """A GGUF file as what Hugging Face would say of the model.

    Attributes:
        path: Path of the file.
        fields: Its metadata, as `gguf.GGUFReader` has it.
        architecture: str, one of `ARCHITECTURES`.
        config: Dictionary, the contents of `config.json`.
        tensors: List of `Tensor`.

    Args:
        path: Path of the file.
        reader: A `gguf.GGUFReader` of it.

    Raises:
        ValueError: If there is no place in our models for what it says.
    """

    def __init__(self, path, reader):
        self.path = path
        self.fields = reader.fields
        self.stored = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.field("general.architecture")
        if self.architecture not in ARCHITECTURES:
            self.refuse(
                f"a model of one of the architectures {list(ARCHITECTURES)}",
                f"{self.architecture!r}",
                "Choose another model",
            )
        if self.field("split.count", 1) > 1:
            self.refuse(
                "a whole model",
                f"one of {self.field('split.count')} parts",
                "Merge them with `llama-gguf-split --merge`",
            )
        self._unread = {
            key.removeprefix(f"{self.architecture}.")
            for key in self.fields
            if key.startswith(f"{self.architecture}.")
        }
        self._unread -= set(_IRRELEVANT)
        make_config, self._table, ties = ARCHITECTURES[self.architecture]
        self._drop_copy_of_embeddings(ties)
        self.config = make_config(self)
        self._check_all_was_read()
        self.tensors = self._tensors()

    def refuse(self, expected, received, advice):
        raise ValueError(
            f"Expected {str(self.path)!r} to hold {expected}. Received: "
            f"{received}. {advice}."
        )

    def field(self, key, default=None):
        """The value of a key of the metadata."""
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def take(self, key, default=_REQUIRED):
        """The number or string that the architecture has under a key."""
        self._unread.discard(key)
        name = f"{self.architecture}.{key}"
        value = self.field(name, default)
        if value is _REQUIRED:
            self.refuse(f"`{name}`", "a file without", "Convert it again")
        if isinstance(value, list):
            self.refuse(f"one `{name}` for all layers", value, "Choose another")
        return value

    def take_only(self, key, *allowed):
        """Refuses whatever our models cannot do; the first is the default."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            self.refuse(
                f"`{self.architecture}.{key}`={allowed[0]!r}",
                repr(value),
                "This package cannot do that",
            )

    def shape(self, name):
        if name not in self.stored:
            self.refuse(f"a tensor {name!r}", "a file without", "Copy it again")
        return tuple(int(x) for x in reversed(self.stored[name].shape))

    def read(self, name):
        """One tensor as float32."""
        tensor = self.stored[name]
        try:
            return stored.widened(tensor.data, tensor.tensor_type.name)
        except NotImplementedError:
            self.refuse(
                f"{name!r} in a type that the package `gguf` can read",
                tensor.tensor_type.name,
                "Choose another quantization",
            )

    def _drop_copy_of_embeddings(self, ties):
        """Drops the output matrix where a family has none of its own.

        Some files repeat the embeddings, quantized in another way.
        """
        if not ties or "output.weight" not in self.stored:
            return
        embedding, output = map(
            self.read, ("token_embd.weight", "output.weight")
        )
        distance = np.linalg.norm(output - embedding)
        if distance > 0.2 * np.linalg.norm(embedding):
            self.refuse(
                "an output matrix equal to the embeddings",
                "another one",
                f"A {self.architecture} model here has one matrix for both",
            )
        del self.stored["output.weight"]

    def _check_all_was_read(self):
        rest = {
            key: value
            for key in sorted(self._unread)
            if (value := self.field(f"{self.architecture}.{key}"))
        }
        if rest:
            self.refuse(
                f"a {self.architecture} model that this package knows how to "
                "compute",
                f"one with {rest}",
                "Choose another",
            )

    def _tensors(self):
        blocks = range(self.take("block_count"))
        expected = {
            theirs.replace("*", str(i)): (name.replace("*", str(i)), transform)
            for theirs, (name, transform) in self._table.items()
            for i in (blocks if "*" in theirs else (0,))
        }
        if unknown := sorted(self.stored.keys() - expected.keys()):
            self.refuse(
                f"the tensors of a {self.architecture} model",
                f"{len(unknown)} others, such as {unknown[0]!r}",
                "Choose another",
            )
        missing = sorted(expected.keys() - self.stored.keys())
        missing = [name for name in missing if name != "output.weight"]
        if missing:
            self.refuse(f"a tensor {missing[0]!r}", "none", "Copy it again")
        return [Tensor(self, name, *expected[name]) for name in self.stored]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a model, still in the file.

    Attributes:
        model: A `Model`.
        theirs: str. What the tensor is called there.
        name: str. What Hugging Face calls it.
        transform: Function from the array and the model to what is saved.
    """

    model: Model
    theirs: str
    name: str
    transform: Callable

    @property
    def shape(self):
        shape = self.model.shape(self.theirs)
        return shape[::-1] if self.transform is _transposed else shape

    @property
    def kind(self):
        """What its format is called, if it can be kept as it is, or `None`."""
        tensor = self.model.stored[self.theirs]
        kind = tensor.tensor_type.name
        is_known = kind in stored.FORMATS and tensor.data.ndim == 2
        return kind if is_known else None

    @property
    def is_transposed(self):
        """Whether Hugging Face has the columns of what is stored for rows."""
        return self.transform is _transposed

    def read(self):
        return self.transform(self.model.read(self.theirs), self.model)

    def read_stored(self):
        """The bytes of each row, as the file has them, `(rows, bytes)`."""
        rows = self.model.stored[self.theirs].data
        # The others put rows into another order, and change none.
        return rows if self.is_transposed else self.transform(rows, self.model)


def _as_it_is(x, model):
    return x


def _transposed(x, model):
    return x.T


def _minus_one(x, model):
    return x - 1


def _rotated_apart(heads, x, model):
    """Undoes llama.cpp's order of rows, rotary pairs next to each other."""
    heads = model.config[heads]
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _llama_config(model):
    width = model.take("embedding_length")
    heads = model.take("attention.head_count")
    head_dim = width // heads
    for key in ("attention.key_length", "attention.value_length"):
        model.take_only(key, head_dim)
    model.take_only("rope.dimension_count", head_dim)
    theta = model.take("rope.freq_base", 10000.0)
    _refuse_scaled_positions(model)
    return {
        **_common_config(model, "Llama"),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(model, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in model.stored,
    }


def _common_config(model, prefix):
    heads = model.take("attention.head_count")
    return {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": model.architecture,
        "dtype": "float32",
        "vocab_size": model.shape("token_embd.weight")[0],
        "hidden_size": model.take("embedding_length"),
        "intermediate_size": model.take("feed_forward_length"),
        "num_hidden_layers": model.take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.take("attention.head_count_kv", heads),
        "rms_norm_eps": model.take("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": model.take("context_length"),
        **_token_ids(model),
    }


def _token_ids(model):
    ids = {
        "bos_token_id": model.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": model.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": model.field("tokenizer.ggml.padding_token_id"),
    }
    return {name: token for name, token in ids.items() if token is not None}


def _refuse_scaled_positions(model):
    model.take_only("rope.scaling.type", "none")
    for key in ("factor", "original_context_length", "finetuned"):
        model.take(f"rope.scaling.{key}", None)
    model.take_only("rope.scale_linear", 1)


def _rope_scaling(model, theta, head_dim):
    """What Llama 3.1 and later did to their frequencies, `None` if nothing.

    Files hold the factors that came of it. All models that were published
    share three of the four numbers behind them.
    """
    if "rope_freqs.weight" not in model.stored:
        return None
    factors = model.read("rope_freqs.weight")
    del model.stored["rope_freqs.weight"]
    if (factors == 1).all():
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected):
        model.refuse(
            f"rotary factors {np.round(expected, 4).tolist()}, as in Llama 3",
            np.round(factors, 4).tolist(),
            "Choose another model",
        )
    return scaling


def _llama3_factors(scaling, theta, head_dim):
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # How often a wave fits into what the model was first trained on.
    waves = scaling["original_max_position_embeddings"] / wavelengths
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / scaling["factor"] + kept)


def _gemma_config(model, prefix="Gemma"):
    common = _common_config(model, prefix)
    head_dim = model.take("attention.key_length")
    model.take_only("attention.value_length", head_dim)
    model.take_only("rope.dimension_count", head_dim)
    model.take_only("rope.freq_base", 10000)
    _refuse_scaled_positions(model)
    return {**common, "head_dim": head_dim, "tie_word_embeddings": True}


def _gemma2_config(model):
    config = _gemma_config(model, "Gemma2")
    # llama.cpp, too, tells the largest, which alone scales by another number
    # than the others, by its depth: files do not say.
    largest = config["num_hidden_layers"] == 46
    return {
        **config,
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"]
            if largest
            else config["head_dim"]
        ),
        "attn_logit_softcapping": model.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.take("final_logit_softcapping", 30.0),
        "sliding_window": model.take("attention.sliding_window", 4096),
    }


def _gemma3_config(model):
    common = _common_config(model, "Gemma3")
    head_dim = model.take("attention.key_length")
    model.take_only("attention.value_length", head_dim)
    model.take_only("rope.dimension_count", head_dim)
    # Keras has these three numbers built in.
    model.take_only("rope.freq_base", 1000000)
    model.take_only("rope.freq_base_swa", 10000)
    model.take_only("attention.sliding_window_pattern", 6)
    layers = common["num_hidden_layers"]
    # Without a window all layers are as every sixth is with one.
    window = model.take("attention.sliding_window", 0) or None
    local = [bool(window) and i % 6 < 5 for i in range(layers)]
    # As with Gemma 2, the largest alone scales by another number.
    scalar = (
        common["hidden_size"] // common["num_attention_heads"]
        if layers == 62
        else head_dim
    )
    return {
        **common,
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": model.take("final_logit_softcapping", None),
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if x else "full_attention" for x in local
        ],
        "rope_parameters": {
            "full_attention": {
                "rope_theta": 1000000.0,
                **_linear_scaling(model),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
            },
        },
        "tie_word_embeddings": True,
    }


def _linear_scaling(model):
    """By what the larger Gemma 3 divide the positions of global layers."""
    model.take_only("rope.scaling.type", "none", "linear")
    factor = model.take("rope.scaling.factor", 1.0)
    if model.take("rope.scaling.type", "none") == "none":
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor}


def _gpt2_config(model):
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "vocab_size": model.shape("token_embd.weight")[0],
        "n_positions": model.take("context_length"),
        "n_ctx": model.take("context_length"),
        "n_embd": model.take("embedding_length"),
        "n_inner": model.take("feed_forward_length"),
        "n_layer": model.take("block_count"),
        "n_head": model.take("attention.head_count"),
        "layer_norm_epsilon": model.take("attention.layer_norm_epsilon"),
        # Files say nothing of it. What GPT-2 was trained with.
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
        **_token_ids(model),
    }


def _decoder(norm, norms, query=_as_it_is, key=_as_it_is):
    """The tensors of Llama and of what was made in its image."""
    block = {
        "attn_q": ("self_attn.q_proj", query),
        "attn_k": ("self_attn.k_proj", key),
        "attn_v": ("self_attn.v_proj", _as_it_is),
        "attn_output": ("self_attn.o_proj", _as_it_is),
        "ffn_gate": ("mlp.gate_proj", _as_it_is),
        "ffn_up": ("mlp.up_proj", _as_it_is),
        "ffn_down": ("mlp.down_proj", _as_it_is),
        **{theirs: (name, norm) for theirs, name in norms.items()},
    }
    return {
        "token_embd.weight": ("model.embed_tokens.weight", _as_it_is),
        "output_norm.weight": ("model.norm.weight", norm),
        "output.weight": ("lm_head.weight", _as_it_is),
        **{
            f"blk.*.{theirs}.weight": (f"model.layers.*.{name}.weight", f)
            for theirs, (name, f) in block.items()
        },
    }


_GPT2 = {
    "token_embd.weight": ("transformer.wte.weight", _as_it_is),
    "position_embd.weight": ("transformer.wpe.weight", _as_it_is),
    "output_norm.weight": ("transformer.ln_f.weight", _as_it_is),
    "output_norm.bias": ("transformer.ln_f.bias", _as_it_is),
    **{
        f"blk.*.{theirs}.{kind}": (
            f"transformer.h.*.{name}.{kind}",
            # Its dense layers have their inputs first.
            _transposed if kind == "weight" and "ln" not in name else _as_it_is,
        )
        for theirs, name in {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }.items()
        for kind in ("weight", "bias")
    },
}
_TWO_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SIX_NORMS = {
    **_FOUR_NORMS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}

# For each: its config, its tensors, and whether its output matrix is always
# that of the embeddings.
ARCHITECTURES = {
    "gpt2": (_gpt2_config, _GPT2, True),
    "gemma": (_gemma_config, _decoder(_minus_one, _TWO_NORMS), True),
    "gemma2": (_gemma2_config, _decoder(_minus_one, _FOUR_NORMS), True),
    "gemma3": (_gemma3_config, _decoder(_minus_one, _SIX_NORMS), True),
    "llama": (
        _llama_config,
        _decoder(
            _as_it_is,
            _TWO_NORMS,
            functools.partial(_rotated_apart, "num_attention_heads"),
            functools.partial(_rotated_apart, "num_key_value_heads"),
        ),
        False,
    ),
}
