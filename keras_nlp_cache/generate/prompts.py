"""What `generate()` refuses, rather than answer something else."""

import keras_hub
import numpy as np
from keras import ops

from keras_nlp_cache.generate.loops.sampling import check_loop
from keras_nlp_cache.generate.options.checking import is_int
from keras_nlp_cache.generate.reading import check_empty
from keras_nlp_cache.graph.backbone import CachedBackbone


def check_guesses(*models):
    """Refuses models that could not forget a guess that was wrong."""
    for lm in models:
        if lm.backbone.has_states:
            raise ValueError(
                "Expected a model that keeps keys and values of each token, "
                "for guesses that were wrong to be forgotten. Received: a "
                f"{type(lm).__name__}, in which layers keep a state, which "
                "cannot go back. Call `generate()` without `assistant_model` "
                "and `prompt_lookup_num_tokens`."
            )


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
    check_guesses(lm, assistant)
    sizes = [
        model.backbone.token_embedding.input_dim for model in (lm, assistant)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Expected `assistant_model` to have the vocabulary of the model, "
            f"{sizes[0]} tokens. Received one of {sizes[1]} tokens."
        )


def check_count(name, x):
    """Raises a `ValueError` unless something is an integer of 1 or more."""
    if not is_int(x) or x < 1:
        raise ValueError(
            f"Expected `{name}` to be an integer of 1 or more. Received: {x!r}."
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


def stops_of(lm, stop_token_ids):
    """The token ids to stop at, a tuple of ints.

    Args:
        lm: A `CausalLM`.
        stop_token_ids: As for `stop_tokens()`.

    Raises:
        ValueError: If it is something else, or `"auto"` and there is no
            preprocessor to say.
    """
    stop_token_ids = stop_tokens(stop_token_ids)
    if stop_token_ids != "auto":
        return stop_token_ids or ()
    if lm.preprocessor is None:
        raise ValueError(
            "Expected `stop_token_ids` to be `None` or a sequence of integers "
            'for a model without a `preprocessor`. Received: "auto".'
        )
    ends = (lm.preprocessor.tokenizer.end_token_id, lm.turn_end_id())
    return tuple(x for x in ends if x is not None)


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
    roles = backbone.roles
    expected = (
        "Expected prompts without a `preprocessor` to be a dictionary of "
        f"integer `{roles.token_ids}` and `{roles.padding_mask}`, both (batch, "
        "max_length). "
    )
    if not isinstance(inputs, dict):
        raise ValueError(
            f"{expected}Received: {inputs!r}. To pass text, set `preprocessor`."
        )
    if not {roles.token_ids, roles.padding_mask} <= inputs.keys():
        raise ValueError(f"{expected}Received the keys {sorted(inputs)}.")
    token_ids = ops.convert_to_numpy(inputs[roles.token_ids])
    mask = ops.convert_to_numpy(inputs[roles.padding_mask]).astype(bool)
    if token_ids.ndim != 2 or token_ids.shape != mask.shape:
        raise ValueError(
            f"{expected}Received the shapes {token_ids.shape} and {mask.shape}."
        )
    if not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(f"{expected}Received {token_ids.dtype} token ids.")
    lengths = mask.sum(axis=1)
    if not lengths.size:
        raise ValueError(f"{expected}Received no prompts.")
    check_empty(lengths)
    holes = (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any(axis=1)
    if holes.any():
        row = int(holes.argmax())
        raise ValueError(
            "Expected prompts to be padded at their end. Received: prompt "
            f"{row} with the padding mask {mask[row].astype(int).tolist()}. "
            "Move its tokens to the left."
        )
    check_vocabulary(token_ids[mask], backbone)
    if roles.of_source:
        check_source(inputs, backbone, len(lengths))


def check_source(inputs, backbone, rows):
    """Checks what an encoder is to read before a batch of prompts."""
    roles = backbone.roles
    name = roles.source_ids
    if inputs.get(roles.source) is not None:
        return  # Which the backbone checks.
    if inputs.get(name) is None:
        raise ValueError(
            f"Expected prompts with `{name}`, what the encoder is to read. "
            f"Received the keys {sorted(inputs)}."
        )
    read = ops.convert_to_numpy(inputs[name])
    mask = inputs.get(roles.source_mask)
    mask = np.ones(read.shape[:2]) if mask is None else mask
    mask = ops.convert_to_numpy(mask).astype(bool)
    channels = backbone.input[name].shape[2:]
    if (
        read.shape != (*mask.shape, *channels)
        or mask.ndim != 2
        or len(read) != rows
    ):
        sizes = ", ".join(["batch", "encoder_length", *map(str, channels)])
        and_mask = "" if channels else f" and `{roles.source_mask}`"
        raise ValueError(
            f"Expected `{name}`{and_mask} to be ({sizes}), for the batch of "
            f"{rows} prompts. Received the shapes {read.shape} and {mask.shape}"
            f"{' of a padding mask' if channels else ''}."
        )
    if channels and np.issubdtype(read.dtype, np.integer):
        raise ValueError(
            f"Expected `{name}` to be floating, as a preprocessor makes it. "
            f"Received: dtype {read.dtype}."
        )
    for beside in roles.beside_source:
        shape = rows, *backbone.input[beside].shape[1:]
        if inputs.get(beside) is None:
            continue
        received = tuple(inputs[beside].shape)
        if received != shape:
            raise ValueError(
                f"Expected `{beside}` of shape {shape}, for the batch of "
                f"{rows} prompts. Received shape: {received}."
            )
    reading_nothing = np.flatnonzero(~mask.any(axis=1))
    if len(reading_nothing):
        raise ValueError(
            f"Expected each row of `{name}` to have a token. Received: none in "
            f"row {reading_nothing[0]}, of padding alone."
        )
    if not channels:
        check_vocabulary(read[mask], backbone)


def check_sound(prompt, preprocessor):
    """Checks what a preprocessor is to make an encoder's input of, if sound.

    Args:
        prompt: A prompt or several, of which dictionaries may have `"audio"`.
        preprocessor: The preprocessor of the task, or `None`.
    """
    converter = getattr(preprocessor, "audio_converter", None)
    audio = prompt.get("audio") if isinstance(prompt, dict) else None
    if converter is None or audio is None:
        return
    try:
        x = np.asarray(ops.convert_to_numpy(audio))
        received = f"{x.dtype} of the shape {x.shape}"
    except (TypeError, ValueError):
        x, received = np.asarray(None), f"a {type(audio).__name__}"
    is_mono = x.ndim in (1, 2) or (x.ndim == 3 and x.shape[2] == 1)
    if not is_mono or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            "Expected `audio` to be floating numbers of the shape (samples,), "
            "(batch, samples) or (batch, samples, 1), with "
            f"{converter.sampling_rate} samples a second. Received: "
            f"{received}. Mix channels, divide integers by the largest there "
            "is, and resample what has another rate."
        )


def check_pictures(images):
    """Checks what a preprocessor is to make an encoder's input of, if it sees.

    Args:
        images: What a user passed.
    """
    if not isinstance(images, (list, tuple)):
        rank = len(getattr(images, "shape", ()))
        images = list(images) if rank == 4 else [images]
    shapes = [tuple(getattr(x, "shape", ())) for x in images]
    if not shapes or any(len(x) != 3 or x[2] != 3 for x in shapes):
        raise ValueError(
            "Expected `images` to be an array `(height, width, 3)`, or "
            f"several, one for each text. Received the shapes {shapes}."
        )


def check_vocabulary(token_ids, backbone):
    """Checks an array of token ids, of which there are some."""
    size = backbone.token_embedding.input_dim
    if token_ids.min() < 0 or token_ids.max() >= size:
        raise ValueError(
            f"Expected token ids from 0 to {size - 1}, the vocabulary of the "
            f"model. Received ids from {token_ids.min()} to {token_ids.max()}."
        )


def check_continuation(token_ids, backbone, begun):
    """Checks token ids that a session is to go on with, and returns them.

    Args:
        token_ids: What a user passed.
        backbone: The backbone that reads them.
        begun: bool. Whether there are tokens before them.

    Returns:
        int32 array `(T,)`.
    """
    if ops.is_tensor(token_ids):
        token_ids = ops.convert_to_numpy(token_ids)
    array = np.asarray(token_ids)
    is_empty = array.shape == (0,)
    if array.ndim != 1 or not (
        is_empty or np.issubdtype(array.dtype, np.integer)
    ):
        raise ValueError(
            "Expected `token_ids` to be integers in one dimension. Received: "
            f"{token_ids!r}."
        )
    if is_empty and not begun:
        raise ValueError(
            "Expected `token_ids` to hold at least one token, to begin a "
            f"session with. Received: {token_ids!r}."
        )
    if not is_empty:
        check_vocabulary(array, backbone)
    return array.astype("int32")
