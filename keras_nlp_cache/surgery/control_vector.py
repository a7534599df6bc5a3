"""Control vectors: directions in the hidden states that steer generation."""

import collections.abc
import math
import numbers
import types
import warnings

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.blocks.replaying import active_wiring
from keras_nlp_cache.drop_in import replacements
from keras_nlp_cache.quantization.quantizing import floating_policy
from keras_nlp_cache.surgery import vector_files
from keras_nlp_cache.surgery.positionwise import Positionwise
from keras_nlp_cache.surgery.rewiring import backbone_of
from keras_nlp_cache.surgery.rewiring import rewire_sites
from keras_nlp_cache.surgery.vector_training import train_directions


class ControlVector:
    """One direction in the hidden states for each of some decoder blocks.

    Immutable. Added to what the blocks return, it moves what a model generates
    towards one side of a contrast, or away from it: happy or sad, honest or
    not. Vectors can be added, subtracted, and multiplied by numbers.

    Args:
        directions: Dictionary from indices of decoder blocks, counted from 0,
            to arrays `(hidden_dim,)`. A direction is added to the output of
            its block. Copied, as float32.
        model_hint: str. The family of models that the vector is made for, such
            as `"llama"`. Only vectors with the same hint can be combined.

    Attributes:
        directions: Read-only mapping from ints, in ascending order, to
            read-only float32 arrays `(hidden_dim,)`.
        model_hint: str.
        hidden_dim: int.

    Raises:
        ValueError: If there is no direction, a key is not an index, a
            direction is not 1D, not as long as the others, or not finite, or
            the hint is empty.

    Example:
    ```python
    vector = ControlVector.train(
        lm,
        positive=["the quick fox", "a quick dog"],
        negative=["the lazy fox", "a lazy dog"],
    )
    vector.save("quick.gguf")
    steered = ControlVector.load("quick.gguf").apply(lm, strength=2.0)
    steered.compile(sampler="greedy")
    steered.generate("the dog is", max_length=12)
    ```

    Reference:
        Representation Engineering, https://arxiv.org/abs/2310.01405. Indices,
        signs and files are those of https://github.com/vgel/repeng.
    """

    # Lets NumPy's numbers leave `number * vector` to `__rmul__()`.
    __array_ufunc__ = None

    def __init__(self, directions, model_hint):
        if not isinstance(model_hint, str) or not model_hint:
            raise ValueError(
                "Expected `model_hint` to be a string such as 'llama', and no "
                f"empty one. Received: {model_hint!r}."
            )
        if (
            not isinstance(directions, collections.abc.Mapping)
            or not directions
        ):
            raise ValueError(
                "Expected `directions` to be a dictionary with a direction "
                f"for at least one block. Received: {directions!r}."
            )
        for block in directions:
            if (
                isinstance(block, bool)
                or not hasattr(block, "__index__")
                or block < 0
            ):
                raise ValueError(
                    "Expected the keys of `directions` to be indices of "
                    f"decoder blocks, counted from 0. Received: {block!r}."
                )
        self._directions = {
            block.__index__(): _direction(block, directions[block])
            for block in sorted(directions)
        }
        sizes = {len(x) for x in self._directions.values()}
        if len(sizes) > 1:
            raise ValueError(
                "Expected all directions to have the same size. Received "
                f"directions of sizes {sorted(sizes)}."
            )
        self._model_hint = model_hint

    @property
    def directions(self):
        return types.MappingProxyType(self._directions)

    @property
    def model_hint(self):
        return self._model_hint

    @property
    def hidden_dim(self):
        return len(next(iter(self._directions.values())))

    def __repr__(self):
        return (
            f"ControlVector(blocks={list(self._directions)}, "
            f"hidden_dim={self.hidden_dim}, model_hint={self._model_hint!r})"
        )

    # === Training ===

    @classmethod
    def train(cls, lm, positive, negative, batch_size=8):
        """Finds the directions in which pairs of prompts differ.

        For each decoder block but the first, this is the principal component
        of the differences between the hidden states of the last tokens.

        Args:
            lm: A `CausalLM` of this package with a preprocessor and at least
                two decoder blocks.
            positive: List of strings.
            negative: List of strings, as many. Each should differ from its
                partner in what is to be steered and in nothing else.
            batch_size: int. How many prompts to run at a time.

        Returns:
            A `ControlVector` with directions of norm 1, on which the positive
            prompts project larger than the negative ones, on average.

        Raises:
            ValueError: If an argument is none of the above, a prompt has no
                tokens or more than the model has positions, or no pair
                differs.
            ImportError: If scikit-learn is not installed.

        Example:
        ```python
        vector = ControlVector.train(
            lm, ["the quick brown fox"], ["the lazy brown dog"]
        )
        vector.directions[1].shape  # (hidden_dim,)
        ```

        Reference:
            https://arxiv.org/abs/2310.01405, section 3.1
        """
        return cls(
            train_directions(lm, positive, negative, batch_size),
            model_hint=_model_hint(lm.backbone),
        )

    # === Applying ===

    def apply(
        self,
        model,
        strength=1.0,
        name="control_vector",
        generated_only=False,
        side="decoder",
    ):
        """Steers a model. See `keras_nlp_cache.surgery.apply()`.

        Example:
        ```python
        vector = ControlVector({1: np.ones(32)}, model_hint="gpt2")
        steered = vector.apply(lm, strength=0.5)
        ```
        """
        return apply(model, self, strength, name, generated_only, side)

    # === Arithmetic ===

    def __eq__(self, other):
        if not isinstance(other, ControlVector):
            return NotImplemented
        return (
            self._model_hint == other._model_hint
            and self._directions.keys() == other._directions.keys()
            and all(
                np.array_equal(x, other._directions[block])
                for block, x in self._directions.items()
            )
        )

    def __add__(self, other):
        if not isinstance(other, ControlVector):
            return NotImplemented
        for name in ("model_hint", "hidden_dim"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    "Expected two control vectors for the same model. "
                    f"Received vectors of {name} {ours!r} and {theirs!r}."
                )
        blocks = self._directions.keys() | other._directions.keys()
        zero = np.zeros(self.hidden_dim, "float32")
        return self._with(
            {
                block: self._directions.get(block, zero)
                + other._directions.get(block, zero)
                for block in blocks
            }
        )

    def __sub__(self, other):
        if not isinstance(other, ControlVector):
            return NotImplemented
        return self + -other

    def __neg__(self):
        return self._with({i: -x for i, x in self._directions.items()})

    def __mul__(self, factor):
        if not isinstance(factor, numbers.Real):
            return NotImplemented
        # In float64, so that a factor is not rounded before it is used.
        factor = np.float64(factor)
        return self._with({i: factor * x for i, x in self._directions.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        if not isinstance(divisor, numbers.Real):
            return NotImplemented
        if divisor == 0:
            raise ZeroDivisionError("division of a control vector by zero")
        divisor = np.float64(divisor)
        return self._with({i: x / divisor for i, x in self._directions.items()})

    def _with(self, directions):
        return ControlVector(directions, self._model_hint)

    # === Files ===

    def save(self, path):
        """Writes the vector to a file.

        A file that is there already is replaced when the new one is complete,
        and stays as it is if writing fails.

        Args:
            path: Path that ends in `.safetensors`, or in `.gguf` for a file
                that `repeng` and llama.cpp read.

        Raises:
            ValueError: If the path ends in something else.
            OSError: If the file cannot be written.
            ImportError: If the package for the format is not installed.
        """
        vector_files.write(path, self._directions, self._model_hint)

    @classmethod
    def load(cls, path):
        """Reads a vector from a file that `save()` or `repeng` wrote.

        Args:
            path: Path that ends in `.safetensors` or `.gguf`.

        Returns:
            A `ControlVector`.

        Raises:
            ValueError: If the path ends in something else, the file is
                damaged, or what it holds is not a control vector.
            OSError: If the file cannot be read.
            ImportError: If the package for the format is not installed.
        """
        directions, model_hint = vector_files.read(path)
        try:
            return cls(directions, model_hint)
        except ValueError as e:
            raise ValueError(
                f"Expected {str(path)!r} to hold a control vector. {e}"
            ) from e


@keras.saving.register_keras_serializable("keras_nlp_cache")
class AddDirection(Positionwise, keras.layers.Layer):
    """Adds one of several directions to hidden states.

    One such layer steers a whole model: it is called after each block that has
    a direction. Its weights, `directions` `(len(blocks), hidden_dim)` and the
    `strength`, are float32 and not trainable. Assigning either shows in
    the next call, with nothing compiled again.

    Args:
        blocks: List of ints. The blocks that have a direction.
        hidden_dim: int.
        rows: Optional int. The rows of a batch, for `strength` to be of shape
            `(rows,)`. Defaults to one strength for any number of rows.
        generated_only: bool. Whether to leave the tokens of prompts alone.
        **kwargs: See `keras.layers.Layer`.

    Call arguments:
        x: Hidden states `(B, T, hidden_dim)`, or several streams of these,
            `(streams, B, T, hidden_dim)`.
        block: int, one of `blocks`.
        generated: Optional int tensor `(B, T)`, not 0 where the token that
            follows is generated. With `generated_only` nothing is added
            elsewhere, and nowhere without it.

    Returns:
        `x + strength * directions[blocks.index(block)]`, in the dtype of `x`.

    Raises:
        ValueError: If `block` has no direction, or `x` another number of rows.
    """

    def __init__(
        self, blocks, hidden_dim, rows=None, generated_only=False, **kwargs
    ):
        # The hidden states go on as they came, in whatever dtype.
        super().__init__(autocast=False, **kwargs)
        self.blocks = list(blocks)
        self.hidden_dim = hidden_dim
        self.rows = rows
        self.generated_only = generated_only

    def build(self, input_shape):
        kwargs = dict(dtype="float32", autocast=False, trainable=False)
        self.directions = self.add_weight(
            shape=(len(self.blocks), self.hidden_dim),
            initializer="zeros",
            name="directions",
            **kwargs,
        )
        self.strength = self.add_weight(
            shape=() if self.rows is None else (self.rows,),
            initializer="ones",
            name="strength",
            **kwargs,
        )

    def call(self, x, block, generated=None):
        if block not in self.blocks:
            raise ValueError(
                f"Expected `block` to be one of {self.blocks}, the blocks that "
                f"layer {self.name!r} has directions for. Received: {block!r}."
            )
        batch = x.shape[-3]
        if self.rows is not None and isinstance(batch, int):
            if batch != self.rows:
                raise ValueError(
                    f"Expected a batch of {self.rows} rows, for each of which "
                    f"layer {self.name!r} has a strength. Received: "
                    f"{batch}. Apply the vector with as many strengths, "
                    "or with one for all."
                )
        if self.generated_only and generated is None:
            return x
        update = self.directions[self.blocks.index(block)]
        update = ops.reshape(self.strength, (-1, 1, 1)) * update
        if self.generated_only:
            is_generated = ops.cast(generated != 0, update.dtype)
            update = update * is_generated[:, :, None]
        return x + ops.cast(update, x.dtype)

    def compute_output_spec(self, x, block, generated=None):
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "blocks": self.blocks,
            "hidden_dim": self.hidden_dim,
            "rows": self.rows,
            "generated_only": self.generated_only,
        }


def apply(
    model,
    vector,
    strength=1.0,
    name="control_vector",
    generated_only=False,
    side="decoder",
):
    """Adds a control vector to the hidden states of a model.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        vector: A `ControlVector`.
        strength: float. What to multiply the vector by. 0 gives what `model`
            gives, a negative number steers the other way. Or a sequence of
            floats, one for each row of the batches that the model will get.
        name: str. Name of the layer that adds it. If the model has a layer of
            that name, a number is appended: a second vector is added by
            `"control_vector_1"`.
        generated_only: bool. Whether to steer only where the model generates:
            at the last token of a prompt and at those that it generates
            itself, as `generate()`, `stream()` and sessions do. In a call of
            the backbone, the optional input `generated`, int `(B, T)`, is 1 at
            these tokens; without it nothing is steered, so that `score()` and
            a call of the task give what `model` gives.
        side: `"decoder"`, or `"encoder"` for the directions to be of the blocks
            of an encoder, which `generated_only` does not go with.

    Returns:
        A model of the same class with one layer more, which is called after
        each block that the vector has a direction for. Assign to its weight
        `strength` to steer on, with nothing compiled again.

    Warns:
        UserWarning: If the vector is for another family of models.

    Raises:
        ValueError: If the vector is not made for a model of this depth and
            hidden size, or `strength` is not a finite number or a sequence of
            these, or there is no such `side`.

    Example:
    ```python
    vector = ControlVector({1: np.ones(32)}, model_hint="gpt2")
    steered = vector.apply(lm, strength=0.5)
    steered.compile(sampler="greedy")
    steered.generate("the fox", max_length=12)
    layer = steered.backbone.get_layer("control_vector")
    layer.strength.assign(-0.5)
    steered.generate("the fox", max_length=12)
    ```

    Reference:
        https://arxiv.org/abs/2310.01405, section 3.2
    """
    backbone = backbone_of(model)
    if not isinstance(vector, ControlVector):
        raise ValueError(
            "Expected `vector` to be a `ControlVector`. Received an instance "
            f"of {type(vector).__module__}.{type(vector).__name__}."
        )
    rows = _rows(strength)
    blocks = _blocks(backbone, side, generated_only)
    depth, last = len(blocks), max(vector.directions)
    if last >= depth:
        raise ValueError(
            "Expected a control vector for at most the "
            f"{depth} {side} blocks of {model.name!r}. Received one with a "
            f"direction for block {last}, counted from 0. Train it with this "
            "model."
        )
    hidden_dim = blocks[0].shape[-1]
    if vector.hidden_dim != hidden_dim:
        raise ValueError(
            f"Expected directions of the hidden size of {model.name!r}, "
            f"{hidden_dim}. Received directions of size {vector.hidden_dim}. "
            "Train the control vector with this model."
        )
    family = _model_hint(backbone)
    if _family(vector.model_hint) != _family(family):
        warnings.warn(
            f"Expected a control vector for the family of {model.name!r}, "
            f"{family!r}. Received one for {vector.model_hint!r}, whose "
            "directions mean nothing there. Train it with this model.",
            stacklevel=2,
        )
    layer = AddDirection(
        vector.directions,
        hidden_dim,
        rows,
        bool(generated_only),
        dtype=floating_policy(backbone.blocks[0]),
        name=_unused_name(backbone, name),
    )
    layer.build((None, None, hidden_dim))
    layer.directions.assign(np.stack(list(vector.directions.values())))
    layer.strength.assign(strength)

    def call(site, *args, **kwargs):
        x = site.layer(*args, **kwargs)
        if site in blocks and blocks.index(site) in vector.directions:
            generated = active_wiring().generated if generated_only else None
            x = layer(x, block=blocks.index(site), generated=generated)
        return x

    return rewire_sites(model, call)


def _rows(strength):
    """How many strengths there are, `None` for a single number.

    Raises:
        ValueError: If it is neither a finite number nor a sequence of these.
    """
    strengths = strength
    if isinstance(strength, numbers.Real):
        strengths = [strength]
    elif isinstance(strength, np.ndarray) and strength.ndim == 1:
        strengths = strength.tolist()
    if (
        not isinstance(strengths, list | tuple)
        or not strengths
        or any(
            isinstance(x, bool)
            or not isinstance(x, numbers.Real)
            or not math.isfinite(x)
            for x in strengths
        )
    ):
        raise ValueError(
            "Expected `strength` to be a finite number, or a sequence of these "
            f"with one for each row. Received: {strength!r}."
        )
    return None if isinstance(strength, numbers.Real) else len(strengths)


def _unused_name(backbone, name):
    taken = {layer.name for layer in backbone.layers}
    unused, i = name, 0
    while unused in taken:
        i += 1
        unused = f"{name}_{i}"
    return unused


def _blocks(backbone, side, generated_only):
    """The calls of the blocks of a side, in order.

    Raises:
        ValueError: If there are none, or none that generate and are to.
    """
    attributes = {"decoder": "block", "encoder": "encoder_block"}
    blocks = [
        site
        for site in backbone.sites
        if getattr(site, attributes.get(side, ""), None) is not None
    ]
    if not blocks:
        raise ValueError(
            'Expected `side` to be "decoder", or "encoder" for a model that '
            f"has one. Received: {side!r}, for a {type(backbone).__name__!r}."
        )
    if generated_only and side == "encoder":
        raise ValueError(
            "Expected `generated_only=False` for the encoder, which generates "
            "nothing. Received: generated_only=True."
        )
    return blocks


# What transformers, and `repeng` with it, calls the families that are called
# otherwise here.
_WORDS = {
    "gemma3": "gemma3_text",
    "gptneox": "gpt_neox",
    "gptoss": "gpt_oss",
    "qwen": "qwen2",
    "qwenmoe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}


def _family(hint):
    """What a family is called here, of what others call it."""
    name = _letters(hint)
    ours = {_letters(theirs): ours for ours, theirs in _WORDS.items()}
    return ours.get(
        name, {"llama3": "llama", "gemma2": "gemma"}.get(name, name)
    )


def _letters(hint):
    return "".join(filter(str.isalnum, hint.lower()))


def _model_hint(backbone):
    """The family in the words of transformers, where Llama 3 is a Llama."""
    *_, family = (
        cls for cls in type(backbone).__mro__ if cls in replacements()
    )
    name = family.__name__.removesuffix("Backbone").lower()
    return _WORDS.get(name, name)


def _direction(block, x):
    try:
        # A number that is too large for float32 is refused below.
        with np.errstate(over="ignore"):
            x = np.array(x, dtype="float32")
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"Expected the direction of block {block} to be an array of "
            f"numbers. Received: {x!r} of type {type(x).__name__}."
        ) from e
    if x.ndim != 1 or x.size == 0:
        raise ValueError(
            f"Expected the direction of block {block} to be of shape "
            f"(hidden_dim,). Received an array of shape {x.shape}."
        )
    if not np.isfinite(x).all():
        raise ValueError(
            f"Expected the direction of block {block} to be finite. Received "
            f"{np.sum(~np.isfinite(x))} numbers that are not, or that are too "
            "large for float32."
        )
    x.setflags(write=False)
    return x
