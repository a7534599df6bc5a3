"""What `generate()` refuses, rather than answer something else."""

import keras_hub
import numpy as np
from keras import ops

from keras_nlp_cache.backbone import CachedBackbone
from keras_nlp_cache.loops.generation import check_loop


def is_int(x):
    """Whether something is an integer, and no boolean."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def check_assistant(lm, assistant):
    """Checks that a model, or `None`, can guess what another generates."""
    if assistant is None:
        if isinstance(lm.sampler, keras_hub.samplers.SpeculativeSampler):
            raise ValueError(
                "Expected an `assistant_model` that guesses tokens, as the "
                "model was compiled with a `SpeculativeSampler`. Received: "
                "assistant_model=None."
            )
        return
    if not isinstance(assistant, keras_hub.models.CausalLM) or not isinstance(
        assistant.backbone, CachedBackbone
    ):
        raise ValueError(
            "Expected `assistant_model` to be a `CausalLM` of "
            "`keras_nlp_cache.models`. Received an instance of "
            f"{type(assistant).__module__}.{type(assistant).__name__}."
        )
    for model in (lm, assistant):
        check_loop(model)
    sizes = [
        model.backbone.token_embedding.input_dim for model in (lm, assistant)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Expected `assistant_model` to have the vocabulary of the model, "
            f"{sizes[0]} tokens. Received one of {sizes[1]} tokens."
        )


def check_max_length(max_length):
    """Checks how long a text may become, `None` if the preprocessor says."""
    if max_length is not None and not (is_int(max_length) and max_length > 0):
        raise ValueError(
            "Expected `max_length` to be `None` or an integer of 1 or more. "
            f"Received: {max_length!r}."
        )


def stop_tokens(stop_token_ids):
    """What to stop at, as a tuple of ints, or as it is if nobody says.

    Args:
        stop_token_ids: `None`, `"auto"`, or any collection of token ids: a
            sequence, a set, an array, a tensor.

    Raises:
        ValueError: If it is something else.
    """
    if stop_token_ids is None:
        return None
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        return "auto"
    ids = stop_token_ids
    if ops.is_tensor(ids):
        ids = ops.convert_to_numpy(ids)
    try:
        if isinstance(ids, (str, bytes, dict)):
            raise TypeError
        ids = tuple(int(x) if _is_token_id(x) else None for x in ids)
        if None in ids:
            raise TypeError
    except (TypeError, ValueError) as e:
        raise ValueError(
            'Expected `stop_token_ids` to be `None`, `"auto"` or a sequence of '
            f"integers, or a set or a tensor. Received: {stop_token_ids!r}."
        ) from e
    return tuple(sorted(set(ids)))


def _is_token_id(x):
    if (
        not is_int(x)
        and getattr(x, "shape", None) == ()
        and hasattr(x, "dtype")
    ):
        # One of a tensor of another framework.
        x = np.asarray(x)[()]
    return is_int(x) and abs(int(x)) < 2**31


def check_tokens(inputs, backbone):
    """Checks a batch of prompts that are token ids, padded at their end."""
    expected = (
        "Expected prompts without a `preprocessor` to be a dictionary of "
        "integer `token_ids` and `padding_mask`, both (batch, max_length). "
    )
    if not isinstance(inputs, dict):
        raise ValueError(
            f"{expected}Received: {inputs!r}. To pass text, set `preprocessor`."
        )
    if not {"token_ids", "padding_mask"} <= inputs.keys():
        raise ValueError(f"{expected}Received the keys {sorted(inputs)}.")
    token_ids = ops.convert_to_numpy(inputs["token_ids"])
    mask = ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
    if token_ids.ndim != 2 or token_ids.shape != mask.shape:
        raise ValueError(
            f"{expected}Received the shapes {token_ids.shape} and {mask.shape}."
        )
    if not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(f"{expected}Received {token_ids.dtype} token ids.")
    lengths = mask.sum(axis=1)
    if lengths.size == 0 or lengths.min() == 0:
        raise ValueError(
            "Expected every prompt to have at least one token. Received "
            f"prompts of lengths {lengths.tolist()}."
        )
    holes = (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any(axis=1)
    if holes.any():
        row = int(holes.argmax())
        raise ValueError(
            "Expected prompts to be padded at their end. Received: prompt "
            f"{row} with the padding mask {mask[row].astype(int).tolist()}. "
            "Move its tokens to the left."
        )
    size = backbone.token_embedding.input_dim
    given = token_ids[mask]
    if given.min() < 0 or given.max() >= size:
        raise ValueError(
            f"Expected token ids from 0 to {size - 1}, the vocabulary of the "
            f"model. Received ids from {given.min()} to {given.max()}."
        )


def check_text(prompts, max_length, preprocessor):
    """Checks that prompts say something, all of which will be read."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        return
    if not all(isinstance(prompt, str) for prompt in prompts):
        return
    if not prompts or not all(prompts):
        raise ValueError(
            "Expected `inputs` to hold at least one prompt, and no empty one. "
            f"Received: {prompts!r}. To generate from the start token alone, "
            "set `preprocessor` to `None` and pass its id."
        )
    max_length = max_length or preprocessor.sequence_length
    # A token is a byte or more, and a preprocessor adds two at most.
    longest = max(len(prompt.encode()) for prompt in prompts) + 2
    if max_length is None or longest <= max_length:
        return
    padding_mask = preprocessor.generate_preprocess(
        list(prompts), sequence_length=max_length + 1
    )["padding_mask"]
    lengths = _lengths(padding_mask)
    if lengths.max() > max_length:
        raise ValueError(
            f"Expected prompts of at most `max_length`={max_length} tokens. "
            f"Received: prompt {int(lengths.argmax())}, which has more. "
            "Raise `max_length` or shorten the prompt."
        )


def _lengths(padding_mask):
    """The number of tokens in each row, as a NumPy array."""
    return ops.convert_to_numpy(padding_mask).astype("int32").sum(axis=-1)
