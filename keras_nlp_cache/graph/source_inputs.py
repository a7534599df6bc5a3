"""Checks and completes what a user passes for an encoder, or in its place."""

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.cache.policies.encoded import is_encoded
from keras_nlp_cache.graph.inputs import as_tensor
from keras_nlp_cache.graph.inputs import check_shape


def normalize_source(
    inputs, roles, batch, source, reads, length_of, max_positions=None
):
    """Completes the inputs that are of an encoder, as tensors.

    Args:
        inputs: Dictionary with the names that `roles` has for them, of what was
            passed, or `None`.
        roles: `Roles`.
        batch: Optional int. The rows of the text.
        source: Symbolic tensor like what the encoder returns.
        reads: Dictionary of symbolic tensors like what the encoder reads, with
            those names.
        length_of: Function from the length of that and the dictionary that is
            returned to the length of what the encoder returns.
        max_positions: Optional int. How many positions the encoder has.

    Returns:
        The dictionary, with tensors. All are `None` if there is nothing to
        read.

    Raises:
        ValueError: If a shape does not fit the model or the text, if there are
            both token ids and what an encoder made of some, if there is a
            padding mask of neither, or if there is something beside a text
            that is not read.
    """
    token_ids, mask, sequence = (
        inputs.get(x)
        for x in (roles.source_ids, roles.source_mask, roles.source)
    )
    none = dict.fromkeys(roles.of_source)
    for name in roles.beside_source:
        if token_ids is None and inputs.get(name) is not None:
            raise ValueError(
                f"Expected `{name}` with `{roles.source_ids}`, beside which "
                "the encoder reads them. Received no such text, and "
                f"`{name}` of shape {tuple(np.shape(inputs[name]))}. What was "
                "read before is in the cache, or in what the encoder returned."
            )
    if token_ids is None and sequence is None:
        if mask is not None:
            raise ValueError(
                f"Expected `{roles.source_mask}` with `{roles.source_ids}` or "
                f"`{roles.source}`, of which it says what is padding. Received "
                "neither of them. What is in a cache is there with its padding "
                "mask."
            )
        return none
    if token_ids is not None and sequence is not None:
        raise ValueError(
            f"Expected `{roles.source_ids}`, for the encoder to read, or "
            f"`{roles.source}`, which it returned before. Received both."
        )
    if token_ids is not None:
        name = roles.source_ids
        like = reads[name]
        kinds = "iuf" if len(like.shape) == 2 else "f"
        given = as_tensor(name, token_ids, like.dtype, kinds=kinds)
        further = {} if len(like.shape) == 2 else {"channels": like.shape[-1]}
        check_shape(name, given, batch=batch, encoder_length=None, **further)
    else:
        name = roles.source
        given = as_tensor(name, sequence, source.dtype, kinds="f")
        check_shape(
            name,
            given,
            batch=batch,
            encoder_length=None,
            hidden_dim=source.shape[-1],
        )
    length = given.shape[1]
    if length == 0:
        raise ValueError(
            f"Expected `{name}` to hold at least one token per row. Received "
            f"shape: {tuple(given.shape)}."
        )
    beside = _beside(inputs, roles, reads, given.shape[0])
    if name == roles.source_ids and isinstance(length, int):
        if length_of(length, beside) < 1:
            raise ValueError(
                f"Expected `{name}` to be long enough for the encoder to make "
                "something of it, which it does not of the shape that was "
                f"received: {tuple(given.shape)}."
            )
    if max_positions is not None and isinstance(length, int):
        if length > max_positions:
            raise ValueError(
                f"Expected `{name}` to have at most the {max_positions} "
                "positions that the encoder learned (`max_sequence_length`). "
                f"Received shape: {tuple(given.shape)}."
            )
    if mask is not None:
        mask = as_tensor(roles.source_mask, mask, "int32")
        check_shape(
            roles.source_mask,
            mask,
            batch=given.shape[0],
            encoder_length=length,
        )
    elif not isinstance(given, keras.KerasTensor):
        mask = ops.ones(ops.shape(given)[:2], "int32")
    return {**none, **beside, name: given, roles.source_mask: mask}


def _beside(inputs, roles, reads, batch):
    """What is read beside a text, as tensors, with a row for each of that."""
    found = {}
    for name in roles.beside_source:
        if inputs.get(name) is None:
            continue
        like = reads[name]
        found[name] = as_tensor(name, inputs[name], like.dtype, kinds="iuf")
        axes = ("batch", "height", "width", "channels")
        sizes = dict(zip(axes, (batch, *like.shape[1:]), strict=True))
        check_shape(name, found[name], **sizes)
    return found


def check_encoded(cache, encoded):
    """Raises a `ValueError` unless a cache has its entries where they belong.

    Args:
        cache: Pairs of what is kept, or of `None`.
        encoded: For each pair, whether it is of what an encoder returned.
    """
    for i, (pair, wanted) in enumerate(zip(cache, encoded)):
        for j, kept in enumerate(pair):
            if kept is None:
                continue
            name = f"cache[{i}][{j}]"
            if is_encoded(kept) != wanted:
                what = (
                    "of what an encoder returned" if wanted else "of the text"
                )
                raise ValueError(
                    f"Expected `{name}` to be {what}, "
                    f"{'an `Encoded`' if wanted else 'and no `Encoded`'}. "
                    f"Received: a {type(kept).__name__}. Make a cache with "
                    "`backbone.make_cache(batch_size, max_length)`, and keep "
                    "its pairs in their order."
                )
            if wanted:
                shape = _tensor_of(kept).shape
                check_shape(
                    f"{name}.mask",
                    kept.mask,
                    batch=shape[0],
                    heads=1,
                    length=1,
                    encoder_length=shape[2],
                )


def check_remembered(cache, source, roles, length_of):
    """Raises a `ValueError` if there is nothing to read, or something else.

    Args:
        cache: Pairs of what is kept, or of `None`.
        source: What `normalize_source()` returned.
        roles: `Roles`.
        length_of: Function from the length of what the encoder reads to that of
            what it returns.
    """
    given = source[roles.source_ids]
    name = roles.source_ids
    if given is None:
        given, name = source[roles.source], roles.source
        read = None if given is None else given.shape[1]
    else:
        read = given.shape[1]
        read = length_of(read) if isinstance(read, int) else read
    wanted = f"`{roles.source_ids}` or `{roles.source}`"
    if cache[0][0] is None:
        if given is None:
            raise ValueError(
                f"Expected {wanted}, what the decoder is to read. Received "
                "neither of them, and no cache."
            )
        return
    lengths = {
        kept.length for pair in cache for kept in pair if is_encoded(kept)
    }
    if len(lengths) > 1:
        raise ValueError(
            "Expected all entries of `cache` to be of one text that an encoder "
            f"has read. Received entries of the lengths {sorted(lengths)}."
        )
    (length,) = lengths or {0}
    if given is None and length == 0:
        raise ValueError(
            f"Expected {wanted} in the first call with a `cache`, for what the "
            "decoder reads to be written there. Received a cache of shape "
            f"{_shape(cache)} for that, and nothing to read."
        )
    if given is not None and length not in (0, read):
        raise ValueError(
            f"Expected `{name}` of the length that `cache` has for what the "
            f"encoder read, {length}. Received shape: {tuple(given.shape)}"
            f"{'' if read == given.shape[1] else f', which makes {read}'}. "
            "Begin another text with a new cache, of `make_cache()`."
        )


def _tensor_of(kept):
    return keras.tree.flatten(kept.stored)[0]


def _shape(cache):
    return next(
        tuple(_tensor_of(kept).shape)
        for pair in cache
        for kept in pair
        if is_encoded(kept)
    )
