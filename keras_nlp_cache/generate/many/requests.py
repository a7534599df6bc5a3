"""What a user wants answered, as requests."""

import typing

import numpy as np
from keras import ops

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.loops import sampling
from keras_nlp_cache.generate.loops.answers import Request
from keras_nlp_cache.generate.prompts import check_vocabulary
from keras_nlp_cache.generate.prompts import is_int


class Limits(typing.NamedTuple):
    """How long texts may become, and what becomes of prompts that are too long.

    Attributes:
        max_new_tokens: Optional int.
        max_length: Optional int, prompt included.
        truncation: As for `CausalLM.generate()`.
    """

    max_new_tokens: typing.Any = None
    max_length: typing.Any = None
    truncation: str = "error"


class Prompts:
    """Turns prompts of a user's into requests.

    Args:
        lm: A `CausalLM`.
        limits: `Limits`.
        prefix: Optional string or token ids, what every prompt begins with.
        seed: Optional int. What the sampler would be made with.
        copies: int. How many texts to generate for each prompt.

    Attributes:
        keys: What a prompt that is a dictionary may say.
    """

    keys = ("prompt", "max_new_tokens", "seed", "stream")

    def __init__(self, lm, limits, prefix=None, seed=None, copies=1):
        self._lm, self._limits = lm, limits
        self._prefix, self._seed, self._copies = prefix, seed, copies
        self._kept = 0
        if lm.preprocessor is not None:
            self._kept = len(reading.starts(lm.preprocessor))

    def requests(self, prompts):
        """Yields the `Request`s of an iterable of prompts."""
        for i, prompt in enumerate(prompts):
            said = {"prompt": prompt}
            if self._says_more(prompt):
                said = self._checked(i, prompt)
            token_ids, limit = self._read(
                i, said["prompt"], said.get("max_new_tokens")
            )
            for copy in range(self._copies):
                number = i * self._copies + copy
                (stream,) = sampling.streams(
                    self._lm.generation_loop.sampler,
                    *self._drawn(i, copy, said),
                )
                yield Request(
                    number,
                    token_ids,
                    limit,
                    stream,
                    self._source(i, said["prompt"]),
                )

    @staticmethod
    def _says_more(prompt):
        """Whether a prompt says more than what is to be read."""
        return isinstance(prompt, dict)

    def _source(self, i, prompt):
        """What an encoder is to read, if there is one."""
        return None

    def _longest(self):
        """How long the preprocessor lets texts become, `None` if any."""
        return getattr(self._lm.preprocessor, "sequence_length", None)

    def _drawn(self, i, copy, said):
        """Which stream of which seed a text is drawn from."""
        stream, seed = said.get("stream"), said.get("seed")
        if stream is None:
            # A prompt with a seed does not care where it stands.
            stream = i if seed is None else 0
        seed = self._seed if seed is None else seed
        return [stream * self._copies + copy], seed

    def _checked(self, i, prompt):
        unknown = [key for key in prompt if key not in self.keys]
        if unknown or "prompt" not in prompt:
            raise ValueError(
                f"Expected prompt {i} to be a string, token ids, or a "
                f"dictionary with `prompt` and any of {list(self.keys[1:])}. "
                f"Received the keys {sorted(map(str, prompt))}."
            )
        for key in Prompts.keys[1:]:
            value = prompt.get(key)
            least = 1 if key == "max_new_tokens" else 0
            if value is not None and not (is_int(value) and value >= least):
                raise ValueError(
                    f"Expected `{key}` of prompt {i} to be an integer of "
                    f"{least} or more. Received: {value!r}."
                )
        return prompt

    def _read(self, i, prompt, max_new_tokens=None):
        """The token ids of a prompt, and how many there may be at most."""
        token_ids = self._token_ids(i, prompt)
        most = self._limits.max_length
        room = self._lm.backbone.max_positions
        if max_new_tokens is None:
            max_new_tokens = self._limits.max_new_tokens
        if most is None and max_new_tokens is None:
            most = self._longest()
            if most is None:
                raise ValueError(
                    "Expected `max_new_tokens` or `max_length`, for a model "
                    "whose preprocessor does not say how long a text may "
                    "become. Received: None for both."
                )
        if most is None:
            # Room for what is to come, and for what is there.
            most = len(token_ids) + max_new_tokens
            if room is not None and most > room:
                most = room - max_new_tokens
                why = f" to fit the {room} positions that the model learned"
                token_ids = self._cut(i, token_ids, max(most, 1), why)
                most = room
        else:
            token_ids = self._cut(i, token_ids, most)
        if max_new_tokens is not None:
            most = min(most, len(token_ids) + max_new_tokens)
        if room is not None and most > room:
            raise ValueError(
                f"Expected texts to fit the {room} positions that the model "
                f"learned. Received: max_length={self._limits.max_length}. "
                "Lower it."
            )
        return token_ids, most

    def _cut(self, i, token_ids, length, why=" to fit"):
        if len(token_ids) <= length:
            return token_ids
        if self._limits.truncation == "error":
            raise ValueError(
                f"Expected prompts of at most {length} tokens, for them and "
                f"what is generated{why}. Received: prompt {i} of "
                f"{len(token_ids)} tokens. Shorten it, raise the limit, or "
                "have it cut by `truncation`."
            )
        return reading.cut(
            token_ids, length, self._limits.truncation, self._kept
        )

    def _token_ids(self, i, prompt):
        prefix, preprocessor = self._prefix, self._lm.preprocessor
        if isinstance(prompt, str):
            if preprocessor is None:
                raise ValueError(
                    "Expected token ids, since the model has no "
                    f"`preprocessor`. Received: {prompt!r}. Set "
                    "`lm.preprocessor`."
                )
            token_ids = reading.encode(preprocessor, (prefix or "") + prompt)
        else:
            token_ids = _as_ids(i, prompt)
            if prefix is not None:
                token_ids = np.append(_as_ids("`prefix`", prefix), token_ids)
        if not len(token_ids):
            raise ValueError(
                "Expected every prompt to have at least one token. Received: "
                f"none in prompt {i}. Leave it out, or begin with a token."
            )
        check_vocabulary(token_ids, self._lm.backbone)
        return token_ids


def _as_ids(i, prompt):
    array = prompt
    if ops.is_tensor(array):
        array = ops.convert_to_numpy(array)
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"Expected prompt {i} to be a string, token ids in one dimension, "
            f"or a dictionary with `prompt`. Received: {prompt!r}."
        )
    return array.astype("int32")


def prompts_in(inputs):
    """The prompts that a user passed.

    Returns:
        `(prompts, is_scalar, as_arrays)`: an iterable of prompts, whether it
        is a single one, and whether the result is to be a dictionary of arrays.
    """
    if isinstance(inputs, str):
        return [inputs], True, False
    if isinstance(inputs, dict) and "prompt" in inputs:
        return [inputs], True, False
    if isinstance(inputs, dict):
        if not {"token_ids", "padding_mask"} <= set(inputs):
            raise ValueError(
                "Expected a dictionary of `token_ids` and `padding_mask`, or "
                "of `prompt`, where there are further arguments. Received the "
                f"keys {sorted(inputs)}."
            )
        token_ids, mask = (
            np.asarray(ops.convert_to_numpy(inputs[name]))
            for name in ("token_ids", "padding_mask")
        )
        mask = mask.astype(bool)
        return [row[kept] for row, kept in zip(token_ids, mask)], False, True
    if hasattr(inputs, "as_numpy_iterator"):
        return _of_dataset(inputs), False, False
    texts = reading.texts(inputs)
    if texts is not None:
        return texts, getattr(inputs, "shape", None) == (), False
    if hasattr(inputs, "__len__") and len(inputs) and is_int(inputs[0]):
        return [inputs], True, False
    return inputs, False, False


def _of_dataset(dataset):
    """Yields the strings of a `tf.data.Dataset`, batched or not."""
    for batch in dataset.as_numpy_iterator():
        for prompt in batch if getattr(batch, "ndim", 0) else [batch]:
            yield prompt.decode() if isinstance(prompt, bytes) else prompt
