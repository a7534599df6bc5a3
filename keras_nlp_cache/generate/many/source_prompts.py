"""What a user wants answered by a model with an encoder, as requests."""

import numpy as np
from keras import ops

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.many.requests import Prompts
from keras_nlp_cache.generate.prompts import check_source
from keras_nlp_cache.generate.prompts import check_vocabulary


class SourcePrompts(Prompts):
    """Turns what an encoder is to read, and how texts begin, into requests.

    A prompt is what the task's `generate()` takes for one: a string for the
    encoder, a dictionary that its preprocessor reads, or one of token ids.

    Takes the arguments of `Prompts`.

    Raises:
        ValueError: If there is a `prefix`.
    """

    def __init__(self, lm, limits, prefix=None, seed=None, copies=1):
        if prefix is not None:
            raise ValueError(
                "Expected no `prefix` for a model with an encoder, which reads "
                f"each prompt as a whole. Received: {prefix!r}. Begin each "
                "prompt with it."
            )
        self._lm, self._limits = lm, limits
        self._prefix, self._seed, self._copies = prefix, seed, copies
        # The token that a decoder starts with.
        self._kept = 1
        self._encoded = None, None

    @staticmethod
    def _says_more(prompt):
        return isinstance(prompt, dict) and "prompt" in prompt

    def _longest(self):
        return getattr(self._lm.preprocessor, "decoder_sequence_length", None)

    def _source(self, i, prompt):
        roles = self._lm.backbone.roles
        read = self._read_once(i, prompt)
        names = roles.read_by_encoder
        return {name: read[name] for name in names if name in read}

    def _token_ids(self, i, prompt):
        roles = self._lm.backbone.roles
        token_ids = self._read_once(i, prompt)[roles.token_ids]
        if not len(token_ids):
            raise ValueError(
                "Expected every prompt to have at least one token for the "
                f"decoder. Received: none in prompt {i}. Begin with a token."
            )
        check_vocabulary(token_ids, self._lm.backbone)
        return token_ids.astype("int32")

    def _read_once(self, i, prompt):
        """Arrays by the names that they have for the backbone."""
        if self._encoded[0] != i:
            self._encoded = i, self._arrays(i, prompt)
        return self._encoded[1]

    def _arrays(self, i, prompt):
        roles, preprocessor = self._lm.backbone.roles, self._lm.preprocessor
        if preprocessor is None:
            wanted = {roles.source_ids, roles.token_ids}
            if not isinstance(prompt, dict) or not wanted <= set(prompt):
                raise ValueError(
                    f"Expected prompt {i} to be a dictionary of "
                    f"{sorted(wanted)}, since the model has no `preprocessor`. "
                    f"Received: {prompt!r}."
                )
            read = {
                name: np.asarray(_on_host(x))[None]
                for name, x in prompt.items()
            }
        else:
            self._lm.check_read(prompt)
            read = self._preprocessed(_batch_of_one(prompt))
        read = self._lm.with_rows(read)
        source = read[roles.source_ids]
        ones = np.ones(source.shape[:2], "int32")
        source_mask = read.get(roles.source_mask, ones)
        mask = read.get(
            roles.padding_mask, np.ones(read[roles.token_ids].shape)
        )
        found = {roles.source_ids: source, roles.source_mask: source_mask}
        beside = {x: read[x] for x in roles.beside_source if x in read}
        check_source({**found, **beside}, self._lm.backbone, rows=1)
        found, beside = (
            {name: x[0] for name, x in y.items()} for y in (found, beside)
        )
        if source.ndim == 2:
            # Without padding, of which there may be much.
            kept = np.flatnonzero(found[roles.source_mask]).max() + 1
            found = {name: x[:kept] for name, x in found.items()}
        token_ids = read[roles.token_ids][0][mask[0].astype(bool)]
        return {**found, **beside, roles.token_ids: token_ids}

    def _preprocessed(self, prompt):
        """What the preprocessor makes of it, with all of how a text begins."""
        preprocessor = self._lm.preprocessor
        roles, size = self._lm.backbone.roles, 16
        while True:
            read = preprocessor.generate_preprocess(
                prompt, sequence_length=size
            )
            read = {name: np.array(_on_host(x)) for name, x in read.items()}
            mask = read[roles.padding_mask]
            # Where there is padding, nothing was cut.
            if not mask.all() or mask.shape[1] != size:
                return read
            size *= 4


# How many axes there are of what is no text, without one for several of them.
_AXES_OF_ONE = {"audio": 1, "images": 3}


def _on_host(x):
    return ops.convert_to_numpy(x) if ops.is_tensor(x) else x


def _batch_of_one(prompt):
    """A prompt as preprocessors take several, without the caller's objects."""
    if not isinstance(prompt, dict):
        return [prompt]
    return {
        name: [x] if isinstance(x, str) else np.asarray(_on_host(x))[None]
        for name, x in prompt.items()
    }


def prompts_with_source(inputs, roles):
    """The prompts that a user passed.

    Args:
        inputs: As for the task's `generate()`, or an iterable of prompts.
        roles: `Roles`.

    Returns:
        `(prompts, is_scalar, as_arrays)`, as `prompts_in()`.
    """
    if not isinstance(inputs, dict):
        texts = reading.texts(inputs)
        if isinstance(inputs, str):
            return [inputs], True, False
        return (inputs if texts is None else texts), False, False
    if "prompt" in inputs:
        return [inputs], True, False
    if roles.token_ids in inputs:
        return list(_rows_of_arrays(inputs, roles)), False, True
    values = {
        name: x
        if isinstance(x, str | list | tuple)
        else np.asarray(_on_host(x))
        for name, x in inputs.items()
        if x is not None
    }
    several = {
        name: x
        for name, x in values.items()
        if not isinstance(x, str)
        and getattr(x, "ndim", 4) > _AXES_OF_ONE.get(name, 0)
    }
    if not several:
        return [values], True, False
    count = max(map(len, several.values()))
    rows = []
    for i in range(count):
        row = {
            name: x[min(i, len(x) - 1)] if name in several else x
            for name, x in values.items()
        }
        rows.append(row)
    return rows, False, False


def _rows_of_arrays(inputs, roles):
    """Yields each row of a batch of token ids, padded at their end."""
    arrays = {
        name: np.asarray(_on_host(x))
        for name, x in inputs.items()
        if x is not None
    }
    for i in range(len(arrays[roles.token_ids])):
        row = {name: x[i] for name, x in arrays.items()}
        mask = row.pop(roles.padding_mask, None)
        if mask is not None:
            row[roles.token_ids] = row[roles.token_ids][mask.astype(bool)]
        yield row
