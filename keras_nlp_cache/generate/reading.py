"""How prompts become token ids: what is cut, and what is refused."""

import contextlib

import keras
import numpy as np
from keras import ops

_TRUNCATIONS = ("error", "left", "right")
# By a class of preprocessors and by what stands in a text, the attribute that
# holds what a user writes for it. For an image, that is the token by which one
# begins, where nobody says something else.
marks = {}
_MARKS = {"image": "start_of_image_token"}
# What is to be passed of it.
_PASSED = {
    "image": "`images`: to `generate()` in a dictionary with `prompts`, or to "
    "`Session.send()`",
    "clip": "`audio` to `generate()`, in a dictionary with `prompts`",
}


def check_truncation(truncation):
    """Checks what is to be done with prompts that are too long."""
    if truncation not in _TRUNCATIONS:
        raise ValueError(
            f"Expected `truncation` to be one of {_TRUNCATIONS}. Received: "
            f"{truncation!r}."
        )


def encode(preprocessor, text):
    """The token ids that a preprocessor makes of a text, all of them.

    Args:
        preprocessor: A `keras_hub.models.CausalLMPreprocessor`.
        text: str.

    Returns:
        int32 array `(T,)`.

    Raises:
        ValueError: If the text says that there is an image, or a clip.
    """
    for noun, passed in _PASSED.items():
        mark = mark_of(noun, preprocessor)
        if mark is not None and mark in text:
            raise ValueError(
                f"Expected a text without {mark!r}, which stands for "
                f"{'an' if noun == 'image' else 'a'} {noun}. Received: "
                f"{text!r}, and no {noun}. Pass {passed}."
            )
    # A token is a byte or more, as a rule, and one or two are added.
    token_ids, _ = encode_whole(preprocessor, [text], len(text.encode()) + 3)
    return token_ids


def mark_of(noun, preprocessor):
    """What stands for an image, say, in a text, `None` if nothing does."""
    names = _MARKS
    for cls in reversed(type(preprocessor).__mro__):
        names = {**names, **marks.get(cls, {})}
    return getattr(preprocessor, names.get(noun, ""), None)


def encode_whole(preprocessor, prompts, size):
    """All that a preprocessor makes of one prompt.

    Args:
        preprocessor: A `keras_hub.models.CausalLMPreprocessor`.
        prompts: A batch of one, as it takes it.
        size: int. How many tokens there might be.

    Returns:
        `(token_ids, x)`: int32 array `(T,)`, and the dictionary that they are
        from.
    """
    while True:
        x = preprocessor.generate_preprocess(prompts, sequence_length=size)
        mask = ops.convert_to_numpy(x["padding_mask"]).astype(bool)
        token_ids = ops.convert_to_numpy(x["token_ids"])[mask].astype("int32")
        # Some normalize a character to many, others always cut.
        if len(token_ids) < size or mask.shape[1] != size:
            return token_ids, x
        size *= 2


def starts(preprocessor):
    """The token ids that a preprocessor begins every text with.

    Returns:
        int32 array, empty if there are none. Upstream's add the start token,
        whatever `add_start_token` says, if the tokenizer has one.
    """
    return encode(preprocessor, "")


def cut(token_ids, length, truncation, kept=0):
    """The tokens of a prompt that is too long that there is room for.

    Args:
        token_ids: Array `(T,)`.
        length: int, 1 or more. How many to keep.
        truncation: `"left"`, to keep the last ones, or `"right"`.
        kept: int. How many to keep at the beginning, whatever is cut.

    Returns:
        Array of at most `length` token ids.
    """
    kept = min(kept, length)
    if len(token_ids) <= length or truncation == "right":
        return token_ids[:length]
    last = token_ids[len(token_ids) - (length - kept) :]
    return np.concatenate([token_ids[:kept], last])


class Call:
    """A task as upstream's `generate()` sees it for one call.

    All but how prompts are read is the task's.

    Args:
        lm: A `CausalLM`.
        max_length: Optional int, as for `CausalLM.generate()`.
        truncation: str, as for `CausalLM.generate()`.
        strip_prompt: bool. Whether prompts are to be left out of what is
            generated, for tasks whose `generate()` cannot be told.
    """

    def __init__(self, lm, max_length, truncation, strip_prompt=False):
        self._lm, self._max_length = lm, max_length
        self._truncation, self._strip_prompt = truncation, strip_prompt
        self._hidden = None
        self.preprocessor = lm.preprocessor
        if lm.preprocessor is not None:
            self.preprocessor = _Reader(lm.preprocessor, truncation)

    def __getattr__(self, name):
        return getattr(self._lm, name)

    @property
    def __class__(self):
        # For `super()` in upstream's methods.
        return type(self._lm)

    @contextlib.contextmanager
    def with_whole_prompts(self):
        """In this scope, prompts are not split over devices.

        Upstream splits them if there is a `keras.distribution`, so that only
        some numbers of prompts are possible, and no process can read those that
        are on the devices of another.
        """
        self._hidden = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield self
        finally:
            keras.distribution.set_distribution(self._hidden)
            self._hidden = None

    def make_generate_function(self):
        generate = self._lm.make_generate_function()
        if self._hidden is not None:
            # To generate, there is one again.
            generate = self._hidden.scope()(generate)
        if not self._strip_prompt:
            return generate

        def generate_and_strip(inputs, stop_token_ids=None):
            outputs = generate(inputs, stop_token_ids=stop_token_ids)
            return _without_prompt(outputs, inputs["padding_mask"])

        return generate_and_strip

    def _normalize_generate_inputs(self, inputs):
        batches, is_scalar = self._lm._normalize_generate_inputs(inputs)
        if self.preprocessor is None and self._max_length is not None:
            batches = [
                self._lm.fitted(x, self._max_length, self._truncation)
                for x in batches
            ]
        return batches, is_scalar


def _without_prompt(outputs, prompt_mask):
    """Moves what follows the prompt of each row to the front."""
    prompt = ops.sum(ops.cast(prompt_mask, "int32"), axis=1, keepdims=True)
    length = ops.shape(prompt_mask)[1]
    moved = ops.mod(ops.arange(length, dtype="int32")[None] + prompt, length)
    mask = ops.logical_and(
        ops.cast(outputs["padding_mask"], "bool"),
        ops.logical_not(ops.cast(prompt_mask, "bool")),
    )
    return {
        "token_ids": ops.take_along_axis(outputs["token_ids"], moved, axis=1),
        "padding_mask": ops.take_along_axis(mask, moved, axis=1),
    }


class _Reader:
    """A preprocessor that reads all of a prompt, or says that it did not."""

    def __init__(self, preprocessor, truncation):
        self._preprocessor, self._truncation = preprocessor, truncation

    def __getattr__(self, name):
        return getattr(self._preprocessor, name)

    def generate_preprocess(self, x, sequence_length=None):
        strings = texts(x)
        if strings == []:
            raise ValueError(
                "Expected `inputs` to hold at least one prompt. Received: "
                f"{x!r}."
            )
        read = self._preprocessor.generate_preprocess(
            x if strings is None else strings, sequence_length=sequence_length
        )
        if strings is None or not _is_prompt(read):
            return read
        mask = ops.convert_to_numpy(read["padding_mask"]).astype(bool)
        check_empty(mask.sum(axis=1), "a preprocessor that adds no start token")
        if self._truncation == "right":
            return read  # As upstream does.
        # Where there is padding, nothing was cut.
        whole = {
            i: encode(self._preprocessor, strings[i])
            for i in np.flatnonzero(mask.all(axis=1))
        }
        length = mask.shape[1]
        whole = {i: ids for i, ids in whole.items() if len(ids) > length}
        if not whole:
            return read
        if self._truncation == "error":
            raise _too_long({i: len(ids) for i, ids in whole.items()}, length)
        token_ids = np.array(ops.convert_to_numpy(read["token_ids"]))
        kept = len(starts(self._preprocessor))
        for i, ids in whole.items():
            token_ids[i] = cut(ids, length, self._truncation, kept)
        return {**read, "token_ids": ops.convert_to_tensor(token_ids)}


def fitted(inputs, max_length, truncation, masks=()):
    """Prompts that are token ids, padded to some length.

    Args:
        inputs: Dictionary of `token_ids` and `padding_mask`, both `(B, T)`,
            padded at their end. Anything else is returned as it is.
        max_length: int. How many tokens each row is to have.
        truncation: str, as for `CausalLM.generate()`.
        masks: Names of what else may have a column for each token. Nothing is
            cut then.

    Returns:
        The dictionary, with arrays `(B, max_length)`.

    Raises:
        ValueError: If prompts have more than `max_length` tokens and
            `truncation` is `"error"`.
    """
    if not isinstance(inputs, dict) or not _is_prompt(inputs):
        return inputs
    token_ids, padding_mask = (
        ops.convert_to_numpy(inputs[name])
        for name in ("token_ids", "padding_mask")
    )
    mask = padding_mask.astype(bool)
    lengths = mask.sum(axis=-1)
    if (
        token_ids.ndim != 2
        or token_ids.shape != mask.shape
        or (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any()
    ):
        return inputs  # To be refused, or the business of a user's own step.
    too_long = {i: lengths[i] for i in np.flatnonzero(lengths > max_length)}
    masks = [name for name in masks if inputs.get(name) is not None]
    if too_long and (masks or truncation == "error"):
        raise _too_long(too_long, max_length)
    padding = ((0, 0), (0, max(0, max_length - mask.shape[1])))
    fitting = np.pad(token_ids, padding)[:, :max_length]
    for i, length in too_long.items():
        fitting[i] = cut(token_ids[i, :length], max_length, truncation)
    inputs = dict(inputs)
    for name in masks:
        mask = ops.convert_to_numpy(inputs[name])
        if mask.shape == token_ids.shape:
            inputs[name] = np.pad(mask, padding)[:, :max_length]
    return {
        **inputs,
        "token_ids": fitting,
        "padding_mask": np.pad(padding_mask, padding)[:, :max_length],
    }


def check_empty(lengths, why=None):
    """Refuses prompts of no tokens, all by their rows.

    Args:
        lengths: int array `(B,)`.
        why: Optional str. What else was received that makes them empty.
    """
    rows = np.flatnonzero(np.asarray(lengths) == 0)
    if len(rows):
        raise ValueError(
            "Expected every prompt to have at least one token. Received: none "
            f"in {_rows(rows)}{', and ' + why if why else ''}. Leave "
            f"{'it' if len(rows) == 1 else 'them'} out, or begin with a token."
        )


def _too_long(lengths, max_length):
    """The error for prompts that are too long, from rows to their lengths."""
    counts = ", ".join(map(str, lengths.values()))
    return ValueError(
        f"Expected prompts of at most `max_length`={max_length} tokens. "
        f"Received: {_rows(lengths)} of {counts} tokens. Raise `max_length`, "
        "shorten what is too long, or have it cut by "
        'truncation="left" or "right".'
    )


def _rows(rows):
    rows = [str(int(i)) for i in rows]
    return f"prompt{'' if len(rows) == 1 else 's'} {', '.join(rows)}"


def _is_prompt(x):
    return {"token_ids", "padding_mask"} <= set(x)


def texts(x):
    """A batch of strings as a list, `None` if it is something else."""
    if not isinstance(x, (list, tuple)):
        dtype = str(getattr(x, "dtype", ""))
        words = ("string", "object", "<U", "|S")
        if not any(word in dtype for word in words) or len(x.shape) != 1:
            return None
        x = np.asarray(x).tolist()
        x = [y.decode() if isinstance(y, bytes) else y for y in x]
    return list(x) if all(isinstance(y, str) for y in x) else None
