"""How the directions of a control vector are found."""

import keras
import numpy as np
from keras import ops
from tqdm import auto as tqdm

from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.surgery import vector_files
from keras_nlp_cache.surgery.edits import tap
from keras_nlp_cache.surgery.selection import select


def train_directions(lm, positive, negative, batch_size):
    """Finds the directions in which pairs of prompts differ.

    Args:
        lm: A `CausalLM` of this package with a preprocessor and at least two
            decoder blocks.
        positive: List of strings.
        negative: List of strings, as many.
        batch_size: int. How many prompts to run at a time.

    Returns:
        Dictionary from the indices of all decoder blocks but the first to
        arrays `(hidden_dim,)` of norm 1.

    Raises:
        ValueError: As described for `ControlVector.train()`.
        ImportError: If scikit-learn is not installed.
    """
    _check_prompts(positive, negative)
    _check_trainable(lm)
    if (
        isinstance(batch_size, bool)
        or not hasattr(batch_size, "__index__")
        or batch_size < 1
    ):
        raise ValueError(
            "Expected `batch_size` to be a positive integer. Received: "
            f"{batch_size!r}."
        )
    # Before the work, not after it.
    vector_files.require("sklearn.decomposition", "scikit-learn")
    token_ids, padding_mask = _tokenize(lm, [*positive, *negative])
    count = len(positive)
    if np.array_equal(token_ids[:count], token_ids[count:]):
        raise ValueError(
            "Expected `positive` and `negative` to differ. Received "
            f"{count} pairs of prompts that are equal, token by token."
        )
    hidden_states = _last_hidden_states(
        lm.backbone, token_ids, padding_mask, batch_size
    )
    return {
        block: principal_direction(block, x[:count] - x[count:])
        for block, x in hidden_states.items()
    }


def _check_prompts(positive, negative):
    for name, prompts in (("positive", positive), ("negative", negative)):
        if not isinstance(prompts, list | tuple) or not prompts:
            raise ValueError(
                f"Expected `{name}` to be a list of at least one prompt. "
                f"Received: {prompts!r}."
            )
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(
                    f"Expected `{name}` to hold strings that are not empty. "
                    f"Received: {prompt!r} at index {i}."
                )
    if len(positive) != len(negative):
        raise ValueError(
            "Expected as many positive as negative prompts, since they are "
            f"compared pair by pair. Received: {len(positive)} positive and "
            f"{len(negative)} negative ones."
        )


def _check_trainable(lm):
    if not isinstance(lm, CausalLM):
        raise ValueError(
            "Expected `lm` to be a `CausalLM` of `keras_nlp_cache.models`. "
            f"Received an instance of {type(lm).__module__}."
            f"{type(lm).__name__}."
        )
    if lm.backbone.roles.of_source or getattr(
        lm.backbone, "needs_images", False
    ):
        raise ValueError(
            "Expected a model without an encoder, whose prompts are one text. "
            f"Received: a {type(lm).__name__!r}. Make a `ControlVector` of "
            "directions."
        )
    if lm.preprocessor is None:
        raise ValueError(
            "Expected a model with a `preprocessor`, to turn prompts into "
            "tokens. Received: preprocessor=None."
        )
    if len(lm.backbone.blocks) < 2:
        raise ValueError(
            "Expected a model of at least 2 decoder blocks, since the first "
            "one gets no direction. Received one of "
            f"{len(lm.backbone.blocks)}."
        )


def _tokenize(lm, prompts):
    """Tokens and padding mask, all prompts padded to the longest."""
    # A token is a byte or more, and a preprocessor adds two at most.
    longest = max(len(prompt.encode()) for prompt in prompts) + 2
    x = lm.preprocessor.generate_preprocess(prompts, sequence_length=longest)
    token_ids, padding_mask = (
        ops.convert_to_numpy(x[name]).astype("int32")
        for name in ("token_ids", "padding_mask")
    )
    lengths = padding_mask.sum(axis=1)
    if lengths.min() == 0:
        raise ValueError(
            "Expected every prompt to have at least one token. Received: "
            f"{prompts[lengths.argmin()]!r}, which has none."
        )
    limit = lm.backbone.max_positions
    if limit is not None and lengths.max() > limit:
        raise ValueError(
            f"Expected prompts that fit the {limit} positions that the model "
            f"learned. Received one of {lengths.max()} tokens: "
            f"{prompts[lengths.argmax()]!r}. Shorten it."
        )
    kept = slice(0, lengths.max())
    return token_ids[:, kept], padding_mask[:, kept]


class LastHiddenStates(keras.Model):
    """What each block but the first returns for the last token of a prompt."""

    def __init__(self, backbone):
        super().__init__(dtype=backbone.dtype_policy)
        self.sites = select(backbone, slice(1, None))
        self.tapped = tap(backbone, list(self.sites))

    def call(self, inputs):
        _, taps = self.tapped(inputs)
        last = ops.sum(inputs["padding_mask"], axis=1, keepdims=True) - 1
        last = ops.cast(last[:, :, None], "int32")
        found = {}
        for site in self.sites:
            x = taps[site.name]
            if len(x.shape) == 4:
                # A direction is added to all streams.
                x = ops.mean(x, axis=0)
            # NumPy, where they go next, has no bfloat16.
            found[str(site.block)] = ops.cast(
                ops.take_along_axis(x, last, axis=1)[:, 0], "float32"
            )
        return found


def _last_hidden_states(backbone, token_ids, padding_mask, batch_size):
    """Dictionary from blocks to arrays `(prompts, hidden_dim)`, float64."""
    model = LastHiddenStates(backbone)
    count = len(token_ids)
    batch_size = min(batch_size, count)
    batches = []
    for start in tqdm.trange(
        0, count, batch_size, desc="Hidden states", unit="batch", disable=None
    ):
        # The last batch is filled up, for all to have the shape that the
        # model is compiled for.
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batches.append(
            model.predict_on_batch(
                {
                    "token_ids": token_ids[rows],
                    "padding_mask": padding_mask[rows],
                }
            )
        )
    return {
        site.block: np.concatenate(
            [batch[str(site.block)] for batch in batches]
        )[:count].astype("float64")
        for site in model.sites
    }


def principal_direction(block, differences):
    """The unit vector along which differences `(pairs, hidden_dim)` lie."""
    if not np.isfinite(differences).all():
        raise ValueError(
            f"Expected finite hidden states. Received some of block {block} "
            "that are not. Load the model in another dtype, float32 say."
        )
    if not differences.any():
        raise ValueError(
            "Expected positive and negative prompts to have different hidden "
            f"states. Received prompts that block {block} cannot tell apart. "
            "Choose a stronger contrast."
        )
    decomposition = vector_files.require(
        "sklearn.decomposition", "scikit-learn"
    )
    # PCA looks for what varies, and takes the mean away. But what all the
    # differences share, their mean, is just what we look for. The paper gives
    # the pairs random signs, for the mean to vanish; each pair with both signs
    # makes it vanish exactly and leaves nothing to chance, nor does the full
    # solver, where the default is a randomized one for large hidden sizes.
    pca = decomposition.PCA(n_components=1, svd_solver="full")
    direction = pca.fit(np.concatenate([differences, -differences]))
    direction = direction.components_[0]
    if np.mean(differences @ direction) < 0:
        direction = -direction
    return direction / np.linalg.norm(direction)
