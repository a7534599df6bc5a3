"""The edits that every test of surgery runs over, on models of three blocks."""

import dataclasses
import functools
import itertools
import typing

import keras
import numpy as np

from keras_nlp_cache import surgery
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.surgery.rewiring import backbone_of
from tests.families import random_tokens
from tests.families import to_numpy

BLOCKS = 3
LENGTH = 8
TOKENS = random_tokens(2, LENGTH)
# Called eagerly, JAX compiles each operation for each length: few are used.
SPLIT = (5, 1, 2)


@functools.cache
def original(family):
    """A task of three blocks, made once for all tests, and not changed."""
    return family.task(
        backbone=family.backbone(num_layers=BLOCKS), preprocessor=None
    )


@dataclasses.dataclass(frozen=True)
class Edit:
    """One way to edit a model.

    Attributes:
        apply: Function from a model to the edited model.
        caches: How many caches a model of `BLOCKS` blocks then has.
    """

    apply: typing.Callable
    caches: int = BLOCKS


_count = itertools.count()


def dense(layer):
    return keras.layers.Dense(32)


def new(layer):
    """A layer like another one, with weights of its own."""
    config = {**layer.get_config(), "name": f"new_{next(_count)}"}
    return type(layer).from_config(config)


def scale_odd(layer, x, *args, **kwargs):
    # Keras numbers other layers as they come.
    is_odd = isinstance(layer, DecoderBlock) and layer.name.endswith("1")
    x = layer(x, *args, **kwargs)
    return x * 1.5 if is_odd else x


def query_of(model):
    """The projection to the query, which may be one to more than that."""
    parts = backbone_of(model).blocks[0].part_paths
    fused = "attention.query_key_value" in parts
    return "query_key_value" if fused else "query"


def lora(model):
    projections = [query_of(model), "output"]
    adapted = surgery.add_lora(model, slice(0, 2), 2, projections)
    rng = np.random.default_rng(1)
    for weight in adapted.weights:
        if weight.name == "up":
            weight.assign(0.3 * rng.normal(size=weight.shape))
    return adapted


EDITS = {
    "insert_after": Edit(lambda m: surgery.insert_after(m, slice(None), dense)),
    "insert_before": Edit(
        lambda m: surgery.insert_before(m, 1, keras.layers.Dense(32))
    ),
    "insert_a_block": Edit(
        lambda m: surgery.insert_after(m, 0, new), BLOCKS + 1
    ),
    "replace_by_a_layer": Edit(
        lambda m: surgery.replace(m, 1, dense), BLOCKS - 1
    ),
    "replace_by_a_block": Edit(lambda m: surgery.replace(m, 0, new)),
    "remove": Edit(lambda m: surgery.remove(m, -1), BLOCKS - 1),
    "repeat_blocks": Edit(
        lambda m: surgery.repeat_blocks(m, slice(0, 2)), BLOCKS + 2
    ),
    "keep_blocks": Edit(
        lambda m: surgery.keep_blocks(m, slice(None, None, 2)), BLOCKS - 1
    ),
    "rewire": Edit(lambda m: surgery.rewire(m, scale_odd)),
    "add_lora": Edit(lora),
    "replace_projections": Edit(
        lambda m: surgery.replace_projections(m, 1, "key", new)
    ),
    "ablate_heads": Edit(lambda m: surgery.ablate_heads(m, 0, [0, -1])),
    "add_attention_sink": Edit(
        lambda m: surgery.add_attention_sink(m, [0, 2], initial=1.0)
    ),
    "tap": Edit(lambda m: surgery.tap(m, slice(None))),
}


def hidden_states(outputs):
    """The hidden states among what a backbone returns."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def full_forward(backbone, token_ids=TOKENS, call=None, **inputs):
    """What a backbone makes of all tokens at once, without a cache.

    Args:
        backbone: A backbone.
        token_ids: int `(B, T)`.
        call: What is called instead of it. `compiled(backbone)` is quicker for
            dtypes that no other test has.
        **inputs: Further inputs.

    Returns:
        float32 `(B, T, hidden_dim)`.
    """
    outputs = (call or backbone)({"token_ids": token_ids, **inputs})
    return to_numpy(hidden_states(outputs))


def cached_forward(
    backbone, sizes=SPLIT, token_ids=TOKENS, call=None, **inputs
):
    """What it makes of `sizes` tokens at a time, through its cache."""
    cache = backbone.make_cache(*token_ids.shape)
    outputs, index = [], 0
    for size in sizes:
        output, cache, *_ = (call or backbone)(
            {
                "token_ids": token_ids[:, index : index + size],
                "cache": cache,
                "cache_update_index": index,
                **inputs,
            }
        )
        outputs.append(to_numpy(output))
        index += size
    return np.concatenate(outputs, axis=1)


def snapshot(lm):
    """All of a model that an edit of another must not change."""
    backbone = backbone_of(lm)
    return {
        "outputs": to_numpy(backbone({"token_ids": TOKENS})),
        "weights": [(w.path, w.trainable, to_numpy(w)) for w in lm.weights],
        "calls": backbone.sites,
        "cache": backbone.cache_spec,
        "blocks": tuple(backbone.blocks),
        "attributes": sorted(vars(backbone)),
        "config": backbone.get_config(),
        "layers": [layer.name for layer in backbone.layers],
        "inputs": [x.name for x in backbone.inputs],
    }


def assert_unchanged(before, after):
    for name, value in before.items():
        np.testing.assert_equal(after[name], value, err_msg=name)
