"""Checks and completes what a user passes to a cached backbone.

Keras flattens a dictionary of inputs by sorted key. A missing key shifts all
that follow, and a dictionary that mixes NumPy arrays, Python numbers and
tensors is refused outright. So a backbone completes its inputs before Keras
sees them, and says what is wrong while it still has names for things.
"""

import keras
import numpy as np
from keras import ops

REQUIRED = ("token_ids",)
OPTIONAL = (
    "padding_mask",
    "cache",
    "cache_update_index",
    "token_positions",
    "attention_mask",
)


def normalize(inputs, cache_spec, max_positions=None):
    """Completes the inputs of a backbone, as tensors.

    Args:
        inputs: A dictionary with the key `"token_ids"` and any of the
            optional keys, each a tensor, a NumPy array, a Python number or
            nested list of them, or `None`.
        cache_spec: Tuple with one `(key_value_heads, head_dim)` per block.
        max_positions: Optional int. The number of positions that the model
            has an embedding for.

    Returns:
        A dictionary with all keys. `"cache"` has one pair per block, of `None`
        if no cache was passed.

    Raises:
        ValueError: If a key is unknown or missing, if a shape or dtype does
            not fit the model or the other inputs, or if a concrete
            `cache_update_index` leaves no room for the tokens.
    """
    if not isinstance(inputs, dict):
        raise ValueError(
            "Expected `inputs` to be a dictionary with the keys "
            f"{list(REQUIRED)} and, if wanted, any of {list(OPTIONAL)}. "
            f"Received: {type(inputs).__name__}."
        )
    for key in inputs:
        if key not in REQUIRED + OPTIONAL:
            raise ValueError(
                f"Unknown key {key!r} in `inputs`. Expected the keys "
                f"{list(REQUIRED)} and, if wanted, any of {list(OPTIONAL)}."
            )
    for key in REQUIRED:
        if inputs.get(key) is None:
            raise ValueError(
                f"Missing key {key!r} in `inputs`. Received the keys: "
                f"{sorted(inputs)}."
            )

    token_ids = _tensor("token_ids", inputs["token_ids"], "int32")
    _check_rank("token_ids", token_ids, "(batch, length)")
    batch, length = token_ids.shape

    cache = inputs.get("cache")
    if _all_none(cache):
        cache = ((None, None),) * len(cache_spec)
        max_length = length
    else:
        cache = _check_cache(cache, cache_spec, batch)
        max_length = cache[0][0].shape[2]
    has_cache = cache[0][0] is not None

    index = inputs.get("cache_update_index")
    index = _check_index(index, has_cache, length, max_length)

    optional = {}
    for key, dtype, shape, meaning in (
        ("padding_mask", "int32", (batch, max_length), "(batch, S)"),
        ("token_positions", "int32", (batch, length), "(batch, T)"),
        (
            "attention_mask",
            None,
            (batch, length, max_length),
            "(batch, T, S)",
        ),
    ):
        value = inputs.get(key)
        if value is not None:
            value = _tensor(key, value, dtype)
            _check_rank(key, value, meaning)
            _check_shape(key, value, shape, meaning, has_cache)
        optional[key] = value
    _check_additive(inputs.get("attention_mask"))
    _check_positions(
        inputs.get("token_positions"),
        index if has_cache else 0,
        length,
        max_positions,
    )
    if index is not None and not ops.is_tensor(index):
        if not isinstance(index, keras.KerasTensor):
            index = ops.convert_to_tensor(index, dtype="int32")
    return {
        "token_ids": token_ids,
        "cache": cache,
        "cache_update_index": index,
        **optional,
    }


def concrete(x):
    """The value of an integer scalar, or `None` while it is being traced."""
    try:
        return int(x)
    except (TypeError, NotImplementedError, RuntimeError, AttributeError):
        # JAX and TensorFlow tracers refuse with a TypeError, fake tensors of
        # PyTorch with a RuntimeError, symbolic Keras tensors with either.
        return None


def _is_tensor(x):
    return ops.is_tensor(x) or isinstance(x, keras.KerasTensor)


def _tensor(name, x, dtype):
    if isinstance(x, keras.KerasTensor):
        return x
    try:
        if not _is_tensor(x):
            x = np.asarray(x)
            if x.dtype.kind not in "biuf":
                raise TypeError(f"dtype {x.dtype}")
        x = ops.convert_to_tensor(x)
        return x if dtype is None else ops.cast(x, dtype)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"Expected `{name}` to be a tensor or an array of numbers. "
            f"Received: {x!r} of type {type(x).__name__}, which cannot be "
            f"converted ({e})."
        ) from e


def _check_rank(name, x, meaning):
    rank = meaning.count(",") + 1
    if x.shape is not None and len(x.shape) != rank:
        raise ValueError(
            f"Expected `{name}` to have rank {rank}, shape {meaning}. "
            f"Received shape: {tuple(x.shape)}."
        )


def _check_shape(name, x, shape, meaning, has_cache):
    for received, expected in zip(x.shape, shape):
        if isinstance(received, int) and isinstance(expected, int):
            if received != expected:
                length = (
                    "S is the length of the cache"
                    if has_cache
                    else "S is the number of tokens, T, as there is no cache"
                )
                raise ValueError(
                    f"Expected `{name}` to have shape {meaning}, which is "
                    f"{shape} for this call ({length}). Received shape: "
                    f"{tuple(x.shape)}."
                )


def _all_none(cache):
    if cache is None:
        return True
    if not isinstance(cache, (tuple, list)):
        return False
    return all(x is None or (_is_pair(x) and _all_none(x)) for x in cache)


def _is_pair(x):
    return isinstance(x, (tuple, list)) and len(x) == 2


def _check_cache(cache, cache_spec, batch):
    advice = "Make one with `backbone.make_cache(batch_size, max_length)`."
    if not isinstance(cache, (tuple, list)):
        raise ValueError(
            "Expected `cache` to be a tuple with one (key, value) pair per "
            f"block, {len(cache_spec)} for this model. Received: "
            f"{type(cache).__name__}. {advice}"
        )
    if len(cache) != len(cache_spec):
        raise ValueError(
            "Expected `cache` to have one (key, value) pair per block, "
            f"{len(cache_spec)} for this model. Received: {len(cache)} "
            f"entries. {advice}"
        )
    checked = []
    first = None
    for i, (pair, (heads, head_dim)) in enumerate(zip(cache, cache_spec)):
        if not _is_pair(pair) or any(x is None for x in pair):
            raise ValueError(
                f"Expected `cache[{i}]` to be a (key, value) pair of tensors. "
                f"Received: {_describe(pair)}. {advice}"
            )
        for j, x in enumerate(pair):
            name = f"cache[{i}][{j}]"
            x = _tensor(name, x, None)
            _check_rank(
                name, x, "(batch, key_value_heads, max_length, head_dim)"
            )
            if first is None:
                first = x
            dtype = keras.backend.standardize_dtype(x.dtype)
            wanted = keras.backend.standardize_dtype(first.dtype)
            if not keras.backend.is_float_dtype(dtype) or dtype != wanted:
                raise ValueError(
                    f"Expected `{name}` to have a floating dtype, the same in "
                    f"all of the cache. Received: {dtype}"
                    + (f" beside {wanted}" if dtype != wanted else "")
                    + f". {advice}"
                )
            shape = (batch, heads, first.shape[2], head_dim)
            for received, expected in zip(x.shape, shape):
                if isinstance(received, int) and isinstance(expected, int):
                    if received != expected:
                        raise ValueError(
                            f"Expected `{name}` to have shape (batch, "
                            "key_value_heads, max_length, head_dim), which is "
                            f"{shape} for this model and these `token_ids`. "
                            f"Received shape: {tuple(x.shape)}. {advice}"
                        )
            checked.append(x)
    return tuple(zip(checked[::2], checked[1::2]))


def _describe(x):
    if _is_tensor(x) or isinstance(x, np.ndarray):
        return f"a single array of shape {tuple(x.shape)}"
    if isinstance(x, (tuple, list)):
        return f"{type(x).__name__} of {[type(y).__name__ for y in x]}"
    return repr(x)


def _check_index(index, has_cache, length, max_length):
    if not has_cache:
        if index is not None:
            raise ValueError(
                "Expected no `cache_update_index` without a `cache`. "
                f"Received: cache_update_index={index}. Pass the cache that "
                "it is an index into."
            )
        return None
    if index is None:
        raise ValueError(
            "Expected `cache_update_index`, the slot of the first of "
            "`token_ids`, with a `cache`. Received: `None`. Pass 0 to fill an "
            "empty cache."
        )
    if isinstance(index, keras.KerasTensor):
        return index
    is_integer = isinstance(index, (int, np.integer)) or (
        hasattr(index, "dtype")
        and "int" in keras.backend.standardize_dtype(index.dtype)
    )
    if (
        isinstance(index, (bool, np.bool_))
        or not is_integer
        or len(getattr(index, "shape", ())) != 0
    ):
        raise ValueError(
            "Expected `cache_update_index` to be one integer, the same for "
            f"all rows of the batch. Received: {index!r}."
        )
    value = concrete(index)
    if value is not None and isinstance(length, int):
        if value < 0:
            raise ValueError(
                "Expected `cache_update_index` to be 0 or more. Received: "
                f"{value}."
            )
        if isinstance(max_length, int) and value + length > max_length:
            raise ValueError(
                f"Expected `cache_update_index` + {length} tokens to stay "
                f"within the {max_length} slots of the cache. Received: "
                f"cache_update_index={value}, which writes up to slot "
                f"{value + length - 1}. Make a longer cache, or pass fewer "
                "tokens."
            )
        return value
    return index


def _check_additive(mask):
    if not isinstance(mask, np.ndarray) or mask.dtype.kind != "f":
        return
    if mask.size and mask.max() > 0:
        raise ValueError(
            "Expected a floating `attention_mask` to hold what is added to "
            "the attention logits: 0 to attend, a large negative number not "
            f"to. Received values up to {mask.max()}. Pass a boolean or "
            "integer array for a mask of ones and zeros."
        )


def _check_positions(positions, index, length, max_positions):
    if max_positions is None or not isinstance(length, int):
        return
    if positions is None:
        last = index + length - 1 if isinstance(index, int) else length - 1
    elif isinstance(positions, (np.ndarray, list, tuple)):
        last = int(np.max(positions))
    else:
        return
    if last >= max_positions:
        raise ValueError(
            f"Expected all tokens of `token_ids` to stand at one of the "
            f"{max_positions} positions that the model learned "
            f"(`max_sequence_length`). Received a token at position {last}. "
            "Shorten the input."
        )
