"""Checks and completes what a user passes to a cached backbone.

Keras flattens a dictionary of inputs by sorted key. A missing key shifts all
that follow, and a dictionary that mixes NumPy arrays, Python numbers and
tensors is refused outright. So a backbone completes its inputs before Keras
sees them, and says what is wrong while it still has names for things.

What can be checked depends on what is known: shapes may be unknown in a
symbolic call, and values while a function is being compiled.
"""

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.kept import has_policy
from keras_nlp_cache.cache.policies.state import is_state
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.cache.slots import is_per_row
from keras_nlp_cache.graph.roles import TEXT

OPTIONAL = (
    "cache",
    "cache_update_index",
    "token_positions",
    "attention_mask",
)
_HOW_TO_MAKE_A_CACHE = (
    "Make a cache with `backbone.make_cache(batch_size, max_length)`."
)


def normalize(
    inputs, cache_spec, max_positions=None, further=(), roles=TEXT, before=0
):
    """Completes the inputs of a backbone, as tensors.

    Args:
        inputs: A dictionary with the key `"token_ids"` and any of the
            optional keys, each a tensor, a NumPy array, a Python number or
            nested list of them, or `None`.
        cache_spec: Tuple with one `(key_value_heads, head_dim)` per block.
        max_positions: Optional int. The number of positions that the model
            has an embedding for.
        further: Names of optional inputs `(B, T)` that this model has beyond
            those of all models.
        roles: `Roles`, what inputs are called.
        before: int. How many places something else takes before the tokens.

    Returns:
        A dictionary with all keys. `"cache"` has one pair per block, of `None`
        if no cache was passed.

    Raises:
        ValueError: If a key is unknown or missing, if a shape or dtype does
            not fit the model or the other inputs, or if the tokens would be
            written past the end of the cache.
    """
    name, further = roles.token_ids, (*roles.beside_text, *further)
    _check_keys(inputs, name, (roles.padding_mask, *OPTIONAL, *further))
    token_ids = as_tensor(name, inputs[name], "int32", kinds="iuf")
    check_shape(name, token_ids, batch=None, length=None)
    batch, length = token_ids.shape
    if isinstance(length, int) and length == 0:
        raise ValueError(
            f"Expected `{name}` to hold at least one token per row. "
            f"Received shape: {tuple(token_ids.shape)}."
        )
    padded_length = length
    if isinstance(length, int):
        length += before

    cache = inputs.get("cache")
    index = inputs.get("cache_update_index")
    if _is_empty(cache, cache_spec):
        cache = ((None, None),) * len(cache_spec)
        max_length = length
        if index is not None:
            raise ValueError(
                "Expected no `cache_update_index` without a `cache`. "
                f"Received: cache_update_index={index}. Pass the cache that "
                "it is an index into."
            )
    else:
        cache = _check_cache(cache, cache_spec, batch)
        padded_length = max_length = _slots(cache)
        index = _check_index(index, batch, length, max_length)

    padding_mask = inputs.get(roles.padding_mask)
    if padding_mask is not None:
        padding_mask = as_tensor(roles.padding_mask, padding_mask, "int32")
        check_shape(
            roles.padding_mask, padding_mask, batch=batch, slots=padded_length
        )
        if max_length is None and index is not None:
            _check_columns(roles.padding_mask, padding_mask, index, length)
    positions = inputs.get("token_positions")
    if positions is not None:
        positions = as_tensor("token_positions", positions, "int32")
        check_shape("token_positions", positions, batch=batch, length=length)
    attention_mask = inputs.get("attention_mask")
    if attention_mask is not None:
        _refuse_for_states(cache_spec)
        _check_additive(attention_mask)
        attention_mask = as_tensor("attention_mask", attention_mask)
        check_shape(
            "attention_mask",
            attention_mask,
            batch=batch,
            length=length,
            slots=max_length,
        )
    others = dict.fromkeys(further)
    for name in further:
        if inputs.get(name) is not None:
            others[name] = as_tensor(name, inputs[name], "int32")
            check_shape(name, others[name], batch=batch, length=length)
    if max_positions is not None:
        _check_positions(positions, index, length, max_positions)
    return {
        roles.token_ids: token_ids,
        roles.padding_mask: padding_mask,
        "cache": cache,
        "cache_update_index": as_tensor("cache_update_index", index, "int32"),
        "token_positions": positions,
        "attention_mask": attention_mask,
        **others,
    }


def _check_keys(inputs, required, optional):
    keys = f"the keys {[required]} and, if wanted, any of {list(optional)}"
    if not isinstance(inputs, dict):
        raise ValueError(
            f"Expected `inputs` to be a dictionary with {keys}. Received: "
            f"{_describe(inputs)}."
        )
    for key in inputs:
        if key != required and key not in optional:
            raise ValueError(
                f"Expected `inputs` to have {keys}. Received an unknown key: "
                f"{key!r}."
            )
    if inputs.get(required) is None:
        raise ValueError(
            f"Expected `inputs` to have {keys}. Received no {required!r}, but "
            f"{sorted(inputs)}."
        )


def as_tensor(name, x, dtype=None, kinds="biuf"):
    """What a user passed as a tensor, `None` and symbolic ones as they are.

    Args:
        name: str, what it is called.
        x: Anything.
        dtype: Optional dtype to cast it to.
        kinds: Of which kinds NumPy's dtypes may be.

    Raises:
        ValueError: If it is no array of numbers.
    """
    if x is None or isinstance(x, keras.KerasTensor):
        return x
    try:
        if not ops.is_tensor(x):
            x = np.asarray(x)
            if x.dtype.kind not in kinds:
                raise TypeError(f"it has dtype {x.dtype}")
        x = ops.convert_to_tensor(x)
        return x if dtype is None else ops.cast(x, dtype)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"Expected `{name}` to be a tensor or an array of numbers. "
            f"Received: {_describe(x)}, which cannot be converted ({e})."
        ) from e


def check_shape(name, x, hint="", **sizes):
    """Compares a shape to the named sizes that are known."""
    if x.shape is None or getattr(x.shape, "rank", 0) is None:
        return  # TensorFlow does not even know the rank.
    if len(x.shape) == len(sizes) and all(
        not isinstance(received, int)
        or not isinstance(expected, int)
        or received == expected
        for received, expected in zip(x.shape, sizes.values())
    ):
        return
    expected = ", ".join(
        f"{size}={value}" if isinstance(value, int) else size
        for size, value in sizes.items()
    )
    raise ValueError(
        f"Expected `{name}` to have rank {len(sizes)} and shape ({expected}). "
        f"Received shape: {tuple(x.shape)}. {hint}".rstrip()
    )


def _is_empty(cache, cache_spec):
    """Whether a cache is `None`, or a pair of `None` for every block."""
    if not isinstance(cache, (tuple, list)):
        return cache is None
    return len(cache) == len(cache_spec) and all(
        _is_pair(pair) and pair[0] is None and pair[1] is None for pair in cache
    )


def _is_pair(x):
    return isinstance(x, (tuple, list)) and len(x) == 2


def _is_stacked(cache):
    """Whether a cache is one array, as tasks of keras_hub stack them."""
    shape = getattr(cache, "shape", ())
    return len(shape) == 6 and shape[2] == 2


def _check_cache(cache, cache_spec, batch):
    if not isinstance(cache, (tuple, list)) or len(cache) != len(cache_spec):
        stacked = (
            "That is one array for all blocks, `(batch, layers, 2, max_length, "
            "heads, head_dim)`, as tasks of keras_hub stack their caches. "
        )
        raise ValueError(
            "Expected `cache` to be a tuple with one (key, value) pair per "
            f"decoder block, {len(cache_spec)} for this model. Received: "
            f"{_describe(cache)}. {stacked if _is_stacked(cache) else ''}"
            f"{_HOW_TO_MAKE_A_CACHE}"
        )
    first = None
    for i, pair in enumerate(cache):
        if not _is_pair(pair) or not all(map(_may_be_kept, pair)):
            raise ValueError(
                f"Expected `cache[{i}]` to be a (key, value) pair of tensors. "
                f"Received: {_describe(pair)}. {_HOW_TO_MAKE_A_CACHE}"
            )
    cache = _as_tensors(cache)
    for i, (pair, spec) in enumerate(zip(cache, cache_spec)):
        if isinstance(spec, StateShapes):
            _check_states(f"cache[{i}]", pair, spec, batch)
            continue
        heads, head_dim = spec
        for j, kept in enumerate(pair):
            name = f"cache[{i}][{j}]"
            for x, head_dim_of_x in _stored(kept, head_dim):
                first = x if first is None else first
                check_shape(
                    name,
                    x,
                    hint=_HOW_TO_MAKE_A_CACHE,
                    batch=batch,
                    key_value_heads=heads,
                    max_length=_places(kept, cache),
                    head_dim=head_dim_of_x,
                )
                _check_cache_dtype(name, kept, x, first)
    return cache


def _check_states(name, pair, shapes, batch):
    for j, (kept, shape) in enumerate(zip(pair, shapes)):
        if not is_state(kept):
            raise ValueError(
                f"Expected `{name}[{j}]` to be a `State`, of a layer that "
                f"keeps no keys and values. Received: {_describe(kept)}. "
                f"{_HOW_TO_MAKE_A_CACHE}"
            )
        check_shape(
            f"{name}[{j}].stored",
            kept.stored,
            hint=_HOW_TO_MAKE_A_CACHE,
            batch=batch,
            **{f"size_{k}": size for k, size in enumerate(shape)},
        )
        dtype = keras.backend.standardize_dtype(kept.stored.dtype)
        if dtype != "float32":
            raise ValueError(
                f"Expected `{name}[{j}].stored` to be float32, as a state is "
                f"in any cache. Received dtype: {dtype}. "
                f"{_HOW_TO_MAKE_A_CACHE}"
            )


def _may_be_kept(x):
    """Whether it is something of a cache, or a tensor or numbers for one."""
    if tree.is_nested(x):
        return has_policy(x) or isinstance(x, Int8)
    return x is not None


def _as_tensors(cache):
    """A cache of arrays and tensors as one of tensors alone."""
    return tuple(
        tuple(
            tree.map_structure(
                lambda x, name=f"cache[{i}][{j}]": as_tensor(name, x), kept
            )
            for j, kept in enumerate(pair)
        )
        for i, pair in enumerate(cache)
    )


def _stored(kept, head_dim):
    """Yields each tensor with a place for each token, and its last size."""
    if has_policy(kept):
        kept = kept.stored
    if isinstance(kept, Int8):
        yield kept.values, head_dim
        yield kept.scale, 1
    else:
        yield kept, head_dim


def _places(kept, cache):
    """How many places something is to have, `None` if it is free to choose."""
    if has_policy(kept):
        return None
    return _slots(cache)


def _slots(cache):
    """How many slots a cache has, `None` if it takes any number of tokens."""
    for pair in cache:
        for kept in pair:
            if not has_policy(kept):
                x, _ = next(_stored(kept, None))
                known = x.shape is not None and len(x.shape) == 4
                return x.shape[2] if known else None
    return None


def _check_cache_dtype(name, kept, x, first):
    dtype = keras.backend.standardize_dtype(x.dtype)
    expected = keras.backend.standardize_dtype(first.dtype)
    if not tree.is_nested(kept) and not keras.backend.is_float_dtype(dtype):
        expected = "a floating dtype"
    elif tree.is_nested(kept) or dtype == expected:
        return
    raise ValueError(
        f"Expected `{name}` to have {expected}, as all of a cache has one "
        f"floating dtype. Received dtype: {dtype}. {_HOW_TO_MAKE_A_CACHE}"
    )


def _check_index(index, batch, length, max_length):
    if isinstance(index, keras.KerasTensor):
        return index
    if index is None:
        raise ValueError(
            "Expected `cache_update_index`, the slot of the first of "
            "`token_ids`, with a `cache`. Received: None. Pass 0 to fill an "
            "empty cache."
        )
    if isinstance(index, (list, tuple)):
        index = np.asarray(index)
    if not (_is_integer(index) and _is_of_rows(index, batch)):
        raise ValueError(
            "Expected `cache_update_index` to be one integer, the same for "
            f"all rows of the batch, or one for each of them, ({batch},). "
            f"Received: {_describe(index)}."
        )
    value = _concrete(index)
    if value is None or not isinstance(length, int):
        return index
    if np.min(value, initial=0) < 0:
        raise ValueError(
            "Expected `cache_update_index` to be 0 or more. Received: "
            f"{value}{_first_row(value, np.min)}."
        )
    last = int(np.max(value, initial=0))
    if isinstance(max_length, int) and last + length > max_length:
        raise ValueError(
            f"Expected `cache_update_index` and {length} tokens to stay "
            f"within the {max_length} slots of the cache. Received: "
            f"cache_update_index={value}, which writes up to slot "
            f"{last + length - 1}{_first_row(value, np.max)}. Make a longer "
            "cache, or pass fewer tokens."
        )
    return value


def _is_of_rows(index, batch):
    """Whether an index is one number, or one for each row of a batch."""
    if not is_per_row(index):
        return True
    count = index.shape[0]
    return len(index.shape) == 1 and (count == batch or None in (count, batch))


def _first_row(value, worst):
    """Names the first row with the worst value, where each has its own."""
    if isinstance(value, int):
        return ""
    return f" in row {int(np.argmax(value == worst(value)))}"


def _is_integer(x):
    if isinstance(x, (bool, np.bool_)):
        return False
    if isinstance(x, (int, np.integer)):
        return True
    if not hasattr(x, "dtype"):
        return False
    return "int" in keras.backend.standardize_dtype(x.dtype)


def _concrete(x):
    """The value of a scalar or array, or `None` while it is being traced."""
    if isinstance(x, (int, np.integer)):
        return int(x)
    try:
        x = ops.convert_to_numpy(x)
    except (TypeError, NotImplementedError, RuntimeError, AttributeError):
        # What JAX, TensorFlow and PyTorch raise for a tracer, a symbolic
        # tensor and a fake one.
        return None
    return x if x.ndim else int(x)


def _check_additive(mask):
    if ops.is_tensor(mask) or isinstance(mask, keras.KerasTensor):
        return
    mask = np.asarray(mask)
    if mask.dtype.kind == "f" and mask.size and mask.max() > 0:
        raise ValueError(
            "Expected a floating `attention_mask` to hold what is added to "
            "the attention logits: 0 to attend, a large negative number not "
            f"to. Received values up to {mask.max()}. Pass a boolean or "
            "integer array for a mask of ones and zeros."
        )


def _check_columns(name, mask, index, length):
    """Checks that a mask speaks of the tokens of a call.

    Where a cache has no number of slots, it is for the mask to say.
    """
    index = _concrete(index)
    columns = getattr(mask, "shape", (None, None))[1]
    if index is None or not isinstance(columns, int):
        return
    last = int(np.max(index)) + length if isinstance(length, int) else 0
    if columns < last:
        raise ValueError(
            f"Expected `{name}` to have a column for each slot up to those "
            f"that are written, {last} or more. Received shape: "
            f"{tuple(mask.shape)}. Pass what it was for earlier tokens, too."
        )


def _check_positions(positions, index, length, max_positions):
    if positions is None:
        known = index is None or isinstance(index, (int, np.ndarray))
        index = index if known and index is not None else 0
        first, last = int(np.min(index)), int(np.max(index))
        last += length - 1 if isinstance(length, int) else 0
    elif isinstance(positions, keras.KerasTensor):
        return
    else:
        positions = _concrete(positions)
        if positions is None:
            return
        first, last = int(np.min(positions)), int(np.max(positions))
    if first < 0 or last >= max_positions:
        raise ValueError(
            f"Expected all of `token_ids` to stand at positions from 0 to "
            f"{max_positions - 1}, which are those that the model learned "
            f"(`max_sequence_length`). Received positions from {first} to "
            f"{last}. Shorten the input, or pass other `token_positions`."
        )


def _refuse_for_states(cache_spec):
    if any(isinstance(x, StateShapes) for x in cache_spec):
        raise ValueError(
            "Expected no `attention_mask` for a model in which layers keep a "
            "state: no token can choose what of it it sees. Received one. Use "
            "`padding_mask` to hide tokens from all others."
        )


def _describe(x):
    if isinstance(x, (tuple, list)):
        entries = ", ".join(type(y).__name__ for y in x[:4])
        more = ", ..." if len(x) > 4 else ""
        return f"a {type(x).__name__} of {len(x)} ({entries}{more})"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {tuple(x.shape)} and dtype {x.dtype}"
    return f"{x!r} of type {type(x).__name__}"
