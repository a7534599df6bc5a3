"""Mistakes get a `ValueError` that says what was expected and what came."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_nlp_cache import models
from tests.families import call_by_hand
from tests.families import deep_families
from tests.families import each_kind
from tests.families import FAMILIES
from tests.families import random_tokens
from tests.families import to_numpy

GPT2 = FAMILIES[0]
BATCH, LENGTH, SLOTS = 2, 4, 8
TOKENS = random_tokens(BATCH, LENGTH)


def good(backbone):
    return {
        "token_ids": TOKENS,
        "cache": backbone.make_cache(BATCH, SLOTS),
        "cache_update_index": 0,
    }


def edited(position, edit):
    """A cache with one of its tensors changed."""

    def change(backbone):
        cache = [list(pair) for pair in backbone.make_cache(BATCH, SLOTS)]
        i, j = position
        cache[i][j] = edit(cache[i][j])
        return {"cache": cache}

    return change


def of_another_model(backbone):
    other = GPT2.ours("Backbone")(
        **dict(GPT2.config, num_heads=1, hidden_dim=16)
    )
    return {"cache": other.make_cache(BATCH, SLOTS)}


CALLS = {
    "one layer too few": (
        lambda b: {"cache": b.make_cache(BATCH, SLOTS)[:1]},
        ["`cache`", "2 for this model", "tuple of 1", "make_cache"],
    ),
    "one layer too many": (
        lambda b: {"cache": b.make_cache(BATCH, SLOTS) * 2},
        ["`cache`", "2 for this model", "tuple of 4"],
    ),
    "no layers": (
        lambda b: {"cache": ()},
        ["`cache`", "2 for this model", "tuple of 0"],
    ),
    "a pair of nothing for one layer": (
        lambda b: {"cache": ((None, None),), "cache_update_index": None},
        ["`cache`", "2 for this model", "tuple of 1"],
    ),
    "upstream's stacked cache": (
        lambda b: {"cache": np.zeros((BATCH, 2, 2, SLOTS, 4, 8), "float32")},
        ["`cache`", "tuple", "(2, 2, 2, 8, 4, 8)"],
    ),
    "no pair": (
        lambda b: {"cache": [x for x, _ in b.make_cache(BATCH, SLOTS)]},
        ["`cache[0]`", "(key, value) pair", "(2, "],
    ),
    "half a pair": (
        edited((1, 1), lambda x: None),
        ["`cache[1]`", "(key, value) pair", "NoneType"],
    ),
    "another batch": (
        lambda b: {"cache": b.make_cache(BATCH + 1, SLOTS)},
        ["`cache[0][0]`", "batch=2", "(3, "],
    ),
    "another rank": (
        edited((0, 0), lambda x: x[0]),
        ["`cache[0][0]`", "rank 4", "Received shape"],
    ),
    "another length in one layer": (
        edited((1, 0), lambda x: x[:, :, :-1]),
        ["`cache[1][0]`", "max_length=8", "7"],
    ),
    "another dtype in one layer": (
        edited((1, 1), lambda x: ops.cast(x, "bfloat16")),
        ["`cache[1][1]`", "float32", "Received dtype: bfloat16"],
    ),
    "integers": (
        edited((0, 0), lambda x: ops.cast(x, "int32")),
        ["`cache[0][0]`", "floating dtype", "Received dtype: int32"],
    ),
    "of another model": (
        of_another_model,
        ["`cache[0][0]`", "key_value_heads=", "make_cache"],
    ),
    "a cache of words": (
        lambda b: {"cache": "cache"},
        ["`cache`", "tuple", "'cache' of type str"],
    ),
    "no index": (
        lambda b: {"cache_update_index": None},
        ["`cache_update_index`", "with a `cache`", "None", "Pass 0"],
    ),
    "an index and no cache": (
        lambda b: {"cache": None},
        ["`cache_update_index`", "without a `cache`"],
    ),
    "a negative index": (
        lambda b: {"cache_update_index": -1},
        ["`cache_update_index`", "0 or more", "-1"],
    ),
    "a negative tensor": (
        lambda b: {"cache_update_index": ops.convert_to_tensor(-2)},
        ["`cache_update_index`", "0 or more", "-2"],
    ),
    "past the end": (
        lambda b: {"cache_update_index": 5},
        ["`cache_update_index`", "8 slots", "up to slot 8"],
    ),
    "past the end as a tensor": (
        lambda b: {"cache_update_index": ops.convert_to_tensor(6)},
        ["`cache_update_index`", "8 slots", "up to slot 9"],
    ),
    "past the end as NumPy": (
        lambda b: {"cache_update_index": np.int64(7)},
        ["`cache_update_index`", "8 slots", "up to slot 10"],
    ),
    "a fractional index": (
        lambda b: {"cache_update_index": 0.5},
        ["`cache_update_index`", "one integer", "0.5"],
    ),
    "a boolean index": (
        lambda b: {"cache_update_index": True},
        ["`cache_update_index`", "one integer", "True"],
    ),
    "an index for each of other rows": (
        lambda b: {"cache_update_index": np.array([0, 1, 2])},
        ["`cache_update_index`", "one for each of them", "(2,)", "(3,)"],
    ),
    "an index for each row and token": (
        lambda b: {"cache_update_index": np.zeros((2, 4), "int32")},
        ["`cache_update_index`", "one for each of them", "(2, 4)"],
    ),
    "past the end of one row": (
        lambda b: {"cache_update_index": np.array([0, 5])},
        ["`cache_update_index`", "8 slots", "up to slot 8 in row 1"],
    ),
    "before the start of one row": (
        lambda b: {"cache_update_index": np.array([0, -1])},
        ["`cache_update_index`", "0 or more", "in row 1"],
    ),
    "one row without a batch": (
        lambda b: {"token_ids": TOKENS[0]},
        ["`token_ids`", "rank 2", "(4,)"],
    ),
    "no tokens": (
        lambda b: {"token_ids": TOKENS[:, :0]},
        ["`token_ids`", "at least one token", "(2, 0)"],
    ),
    "strings": (
        lambda b: {"token_ids": [["a", "b"]] * BATCH},
        ["`token_ids`", "numbers"],
    ),
    "truth values": (
        lambda b: {"token_ids": [[True, False]] * BATCH},
        ["`token_ids`", "numbers", "dtype bool"],
    ),
    "ragged lists": (
        lambda b: {"token_ids": [[1, 2], [3]]},
        ["`token_ids`", "cannot be converted"],
    ),
    "more tokens than slots": (
        lambda b: {"token_ids": random_tokens(BATCH, SLOTS + 1)},
        ["9 tokens", "8 slots"],
    ),
    "no token ids": (
        lambda b: {"token_ids": None},
        ["'token_ids'", "Received no"],
    ),
    "an unknown key": (
        lambda b: {"tokens": TOKENS},
        ["unknown key: 'tokens'", "'token_ids'", "'cache'"],
    ),
    "a padding mask of the tokens alone": (
        lambda b: {"padding_mask": np.ones((BATCH, LENGTH))},
        ["`padding_mask`", "slots=8", "(2, 4)"],
    ),
    "a padding mask of another batch": (
        lambda b: {"padding_mask": np.ones((BATCH + 1, SLOTS))},
        ["`padding_mask`", "batch=2", "(3, 8)"],
    ),
    "positions of all slots": (
        lambda b: {"token_positions": np.ones((BATCH, SLOTS))},
        ["`token_positions`", "length=4", "(2, 8)"],
    ),
    "an attention mask without queries": (
        lambda b: {"attention_mask": np.ones((BATCH, SLOTS), bool)},
        ["`attention_mask`", "rank 3", "(2, 8)"],
    ),
    "an attention mask of ones and zeros as floats": (
        lambda b: {"attention_mask": np.ones((BATCH, LENGTH, SLOTS))},
        ["`attention_mask`", "added to", "boolean or integer"],
    ),
}


# Which a state is not asked, or asked in other words: see `test_states.py`.
NOT_OF_STATES = (
    "another length in one layer",
    "another dtype in one layer",
    "an attention mask without queries",
    "an attention mask of ones and zeros as floats",
)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    for family in FAMILIES:
        if family.keeps_states and name in NOT_OF_STATES:
            continue
        if family.name == "rwkv7":
            continue  # No layer has keys and values, or slots.
        assert_refused(family.pair[0], *CALLS[name])


def assert_refused(backbone, change, words):
    inputs = good(backbone)
    cache = inputs["cache"]
    inputs.update(change(backbone))
    with pytest.raises(ValueError) as error:
        backbone(inputs)
    for word in words:
        assert word in str(error.value), word
    for tensor in (x for pair in cache for x in pair):
        assert not to_numpy(tensor).any(), "the caller's cache was modified"


@deep_families
def test_not_a_dictionary(family):
    with pytest.raises(ValueError, match=r"`inputs` to be a dictionary.*shape"):
        family.pair[0](TOKENS)


@each_kind
def test_a_block_called_by_hand_without_an_index(family):
    if family.name == "rwkv7":
        pytest.skip("its blocks have two entries each, none of keys")
    block = family.pair[0].blocks[0]
    pair = family.pair[0].make_cache(1, 4)[0]
    with pytest.raises(ValueError, match="cache_update_index"):
        call_by_hand(block, ops.zeros((1, 1, 32)), pair, None)


MAKE_CACHE = {
    "no rows": ((0, 4), {}, "`batch_size`.*1 or more.*0"),
    "negative": ((1, -4), {}, "`max_length`.*1 or more.*-4"),
    "fractional": ((1, 4.5), {}, "`max_length`.*integer.*4.5"),
    "a word": (("2", 4), {}, "`batch_size`.*integer.*'2'"),
    "boolean": ((True, 4), {}, "`batch_size`.*integer.*True"),
    "integers": ((1, 4), {"dtype": "int32"}, "`dtype`.*floating.*int32"),
}


@pytest.mark.parametrize("name", MAKE_CACHE)
def test_make_cache(name):
    args, kwargs, match = MAKE_CACHE[name]
    for family in FAMILIES:
        with pytest.raises(ValueError, match=match):
            family.pair[0].make_cache(*args, **kwargs)


def test_learned_positions():
    backbone, lm = GPT2.pair[0], GPT2.lm_pair[0]
    limit = backbone.max_sequence_length
    with pytest.raises(ValueError, match=f"`max_length`.*{limit}"):
        backbone.make_cache(1, limit + 1)
    with pytest.raises(ValueError, match=f"positions from 0 to {limit - 1}"):
        backbone({"token_ids": random_tokens(1, limit + 1)})
    cache = [[np.zeros((1, 4, limit + 1, 8), "float32")] * 2] * 2
    for convert in (int, np.int64, ops.convert_to_tensor):
        with pytest.raises(ValueError, match="Received positions from 64"):
            backbone(
                {
                    "token_ids": random_tokens(1, 1),
                    "cache": cache,
                    "cache_update_index": convert(limit),
                }
            )
    for convert in (np.array, ops.convert_to_tensor):
        with pytest.raises(ValueError, match="Received positions from 0 to 64"):
            backbone(
                {
                    "token_ids": random_tokens(1, 2),
                    "token_positions": convert([[0, limit]]),
                }
            )
        with pytest.raises(ValueError, match="Received positions from -1"):
            backbone(
                {
                    "token_ids": random_tokens(1, 2),
                    "token_positions": convert([[-1, 0]]),
                }
            )
    prompts = {
        "token_ids": random_tokens(1, limit + 4),
        "padding_mask": np.ones((1, limit + 4), "int32"),
    }
    with pytest.raises(ValueError, match=f"`max_length`.*{limit}.*68"):
        lm.generate(prompts, stop_token_ids=None)


@deep_families
def test_generate(family):
    lm = family.lm_pair[0]
    lm.compile(sampler="greedy")
    empty = {
        "token_ids": TOKENS,
        "padding_mask": np.array([[1, 1, 0, 0], [0, 0, 0, 0]]),
    }
    with pytest.raises(ValueError, match="one token.*none in prompt 1"):
        lm.generate(empty, stop_token_ids=None)
    with pytest.raises(ValueError, match="stop_token_ids"):
        lm.generate(empty)


@deep_families
def test_generate_from_text(family):
    preprocessor = family.preprocessor()
    lm = family.task(
        family.backbone(
            vocabulary_size=preprocessor.tokenizer.vocabulary_size()
        ),
        preprocessor,
    )
    long = "the quick brown fox jumps over the lazy dog"
    with pytest.raises(ValueError, match="`max_length`=8.*prompt 1"):
        lm.generate(["a", long], max_length=8)
    with pytest.raises(ValueError, match="at least one prompt"):
        lm.generate([])
    for nothing in ([], ["a", ""]):
        with pytest.raises(ValueError, match="`text`"):
            lm.stream(nothing)


@each_kind
def test_a_backbone_of_upstream(family):
    with pytest.raises(ValueError, match="`backbone`.*keras_nlp_cache.models"):
        family.task(backbone=family.pair[1], preprocessor=None)


def test_presets(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        models.CausalLM.from_preset(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"config\.json"):
        models.CausalLM.from_preset(str(tmp_path))
    GPT2.pair[0].save_to_preset(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="`LlamaCausalLM`.*`GPT2Backbone`"):
        models.LlamaCausalLM.from_preset(str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="`LlamaBackbone`.*`GPT2Backbone`"):
        models.LlamaBackbone.from_preset(str(tmp_path / "gpt2"))
    bert = keras_hub.models.BertBackbone(
        vocabulary_size=10,
        num_layers=1,
        num_heads=1,
        hidden_dim=4,
        intermediate_dim=4,
    )
    bert.save_to_preset(tmp_path / "bert")
    with pytest.raises(ValueError, match="covers.*GPT2.*BertBackbone"):
        models.CausalLM.from_preset(str(tmp_path / "bert"))


def test_traced_index_is_not_checked_but_works():
    """While compiling there is no value to check, and no error either."""
    backbone = GPT2.pair[0]
    model_inputs = good(backbone)
    index = keras.Input(batch_shape=(), dtype="int32")
    symbolic = {
        "token_ids": keras.Input((None,), dtype="int32"),
        "cache": tuple(
            tuple(keras.Input(x.shape[1:]) for x in pair)
            for pair in model_inputs["cache"]
        ),
        "cache_update_index": index,
    }
    assert backbone(symbolic)[0].shape[-1] == 32
