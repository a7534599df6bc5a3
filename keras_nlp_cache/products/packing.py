"""Weights as kernels read them: packed once, and again when they change."""

import dataclasses
import threading

import ml_dtypes
import numpy as np

from keras_nlp_cache.memory import aligned
from keras_nlp_cache.products import choice
from keras_nlp_cache.products.sources import reader
from keras_nlp_cache.products.sources import source

# Of how many bytes a group, or half of one that has nibbles, is a multiple.
SPAN = 16


@dataclasses.dataclass(frozen=True)
class Form:
    """How the numbers of a weight lie in its variable.

    Attributes:
        dtype: str. `"float32"`, `"bfloat16"`, `"float16"`, `"int8"`,
            `"int8_in_groups"` or `"int4"`.
        outputs: int. `N`, how many numbers a product has.
        depth: int. `K`, over how many it sums.
        transposed: bool. Whether the variable is `(N, K)`, and else `(K, N)`.
        is_stored: bool. Whether the variable has this dtype.
        pairs: int. Of `"int4"`, the axis of which a byte holds two numbers.
        block: int. Of the last two, how many along `K` share a scale.
        rounds: bool. Of `"int8"`, whether what it is multiplied with is rounded
            to integers.
    """

    dtype: str
    outputs: int
    depth: int
    transposed: bool = False
    is_stored: bool = True
    pairs: int = 1
    block: int = 0
    rounds: bool = False

    @property
    def kind(self):
        """What `choice.most_rows()` calls a product with it."""
        return f"{self.dtype}_with_rounded" if self.rounds else self.dtype

    @property
    def needs_packing(self):
        """Whether kernels read something else than the variable's memory."""
        as_is = self.transposed and self.is_stored and self.block == 0
        return not as_is

    @property
    def packed_block(self):
        """The length of a group when packed: kernels read it in spans."""
        span = 2 * SPAN if self.dtype == "int4" else SPAN
        return -(-self.block // span) * span


def packed(form, weight, scale=None, zero=None):
    """Packs a weight.

    Args:
        form: `Form`.
        weight: Array as `form` describes it.
        scale: Of what is in groups, float array `(groups, N)`, what to multiply
            with.
        zero: Of `"int4"`, array `(groups, N)`, what to subtract first, or
            `None`.

    Returns:
        A tuple of arrays: the weight, `(N, K)` or of two numbers in a byte
        `(N, groups * packed_block / 2)`, and of what is in groups, float32
        `(N, groups)` for scales and, of `"int4"`, for zeros.
    """
    if form.dtype != "int4":
        if not form.is_stored:
            weight = weight.astype(_array_dtype(form.dtype))
        if not form.transposed:
            weight = _transposed(weight.reshape(form.depth, form.outputs))
        if scale is None:
            return (weight,)
        return weight, np.ascontiguousarray(scale.T, np.float32)
    numbers = _nibbles(form, weight)
    groups = scale.shape[0]
    blocks = np.full((form.outputs, groups, form.packed_block), 8, np.uint8)
    short = groups * form.block - form.depth
    numbers = np.pad(numbers, ((0, 0), (0, short)), constant_values=8)
    blocks[:, :, : form.block] = numbers.reshape(form.outputs, groups, -1)
    half = form.packed_block // 2
    # Unsigned, as it takes less to widen.
    weight = blocks[:, :, :half] | (blocks[:, :, half:] << 4)
    scale = np.asarray(scale, np.float32).T
    zero = np.zeros_like(scale) if zero is None else np.asarray(zero).T
    return (
        np.ascontiguousarray(weight.reshape(form.outputs, -1)),
        np.ascontiguousarray(scale, np.float32),
        np.ascontiguousarray(zero.astype(np.float32) + 8, np.float32),
    )


def _transposed(matrix):
    """A transposed copy, made block by block, each of them in the cache."""
    depth, outputs = matrix.shape
    new = aligned((outputs, depth), matrix.dtype)
    for k in range(0, depth, 64):
        for n in range(0, outputs, 512):
            new[n : n + 512, k : k + 64] = matrix[k : k + 64, n : n + 512].T
    return new


def _array_dtype(dtype):
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype


def _nibbles(form, weight):
    """The numbers of an int4 weight plus 8, uint8 `(N, K)`."""
    byte = np.moveaxis(weight.view(np.uint8), form.pairs, -1)
    numbers = np.empty((*byte.shape, 2), np.uint8)
    numbers[..., 0] = (byte & 15) ^ 8
    numbers[..., 1] = (byte >> 4) ^ 8
    numbers = numbers.reshape(byte.shape[0], -1)
    numbers = np.moveaxis(numbers, -1, form.pairs)
    numbers = numbers if form.transposed else numbers.T
    return numbers[: form.outputs, : form.depth]


class Weight:
    """The weight of a product.

    Args:
        form: `Form`.
        variable: `keras.Variable` with the numbers.
        scales: Function without arguments, that returns the arrays `scale` and,
            of `"int4"`, `zero` of `packed()`. `None` if there are none.
        further: The variables that `scales` reads.
        scale: Of `"int8"`, the `keras.Variable` that a product is divided by.
    """

    def __init__(self, form, variable, scales=None, further=(), scale=None):
        self.form = form
        self.variable = variable
        self.variables = (variable, *further)
        self.scale = scale
        self._scales = scales
        self._sources = [source() for _ in self.variables]

    def changed(self, values):
        """Whether there were other values the last time, or none.

        Args:
            values: The values of `variables`, as tensors of the backend.
        """
        # Each is to take notice.
        changed = [x.changed(y) for x, y in zip(self._sources, values)]
        return any(changed)

    def packed(self, values):
        """A tuple of arrays, see `packed()`.

        Args:
            values: As for `changed()`.
        """
        scales = () if self._scales is None else self._scales()
        return packed(self.form, self._sources[0].array(values[0]), *scales)


class Packed:
    """What a kernel reads of weights, of which each is a part.

    Args:
        weights: List of `Weight`s of one depth, dtype and block, which are
            multiplied with the same input. One, if it is alone.
    """

    def __init__(self, weights):
        first = weights[0]
        self.weights = weights
        self.variables = [x for weight in weights for x in weight.variables]
        outputs = [x.form.outputs for x in weights]
        self.form = dataclasses.replace(first.form, outputs=sum(outputs))
        self._arrays = None

    def arrays(self, values):
        """What a kernel is to be passed, packed again if there is a change.

        Args:
            values: The values of `variables`, as tensors of the backend.

        Returns:
            A tuple of tensors of the backend.
        """
        values = iter(values)
        pairs = [(x, [next(values) for _ in x.variables]) for x in self.weights]
        changed = [weight.changed(of_it) for weight, of_it in pairs]
        if self._arrays is None or any(changed):
            tensor = source().tensor
            self._arrays = None  # Before there are two.
            parts = zip(*[weight.packed(of_it) for weight, of_it in pairs])
            self._arrays = tuple(tensor(_below_each_other(x)) for x in parts)
        return self._arrays


def _below_each_other(arrays):
    if len(arrays) == 1:
        return arrays[0]
    rows = sum(map(len, arrays))
    new = aligned((rows, *arrays[0].shape[1:]), arrays[0].dtype)
    return np.concatenate(arrays, out=new)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a variable in a step.

    Attributes:
        form: `Form` of what is packed with it.
        arrays: Tuple of tensors. `()` if nothing was packed, `None` if the
            value of the variable is what a kernel reads.
        packed: `Packed`, `None` with the last.
        start: int. Which output of `packed` its first one is.
        outputs: int. How many it has.
    """

    form: Form
    arrays: tuple | None
    packed: Packed | None
    start: int
    outputs: int


class Weights:
    """The weights of a model that products of our own are worth for.

    Args:
        found: Dictionary from `id(variable)` to `Weight`.
        together: Lists of `Weight`s among these, each with the same input.
    """

    def __init__(self, found, together=()):
        self._found = found
        in_groups = {id(x) for weights in together for x in weights}
        alone = [
            [x]
            for x in found.values()
            if x.form.needs_packing and id(x) not in in_groups
        ]
        self._packed = [Packed(x) for x in [*together, *alone]]
        self._read = reader([y for x in self._packed for y in x.variables])
        self._lock = threading.Lock()

    def arrays(self, rows):
        """What is packed of weights, as they are now.

        Args:
            rows: int. How many rows of `x` there will be. What is of no use
                for so many is not packed.

        Returns:
            A list of tuples, empty ones of what is not packed.
        """
        worth = [rows <= choice.most_rows(x.form.kind) for x in self._packed]
        if not any(worth):
            return [() for _ in self._packed]
        # Threads that generate would pack the same.
        with self._lock:
            values = iter(self._read())
            all_values = [
                [next(values) for _ in x.variables] for x in self._packed
            ]
            return [
                x.arrays(y) if z else ()
                for x, y, z in zip(self._packed, all_values, worth)
            ]

    def by_variable(self, arrays):
        """What to look up in a product.

        Args:
            arrays: As from `arrays()`, in what is compiled.

        Returns:
            A dictionary from `id(variable)` to `Known`.
        """
        known = {
            key: Known(x.form, None, None, 0, x.form.outputs)
            for key, x in self._found.items()
        }
        for packed, tensors in zip(self._packed, arrays):
            start = 0
            for x in packed.weights:
                outputs = x.form.outputs
                known[id(x.variable)] = Known(
                    packed.form, tensors, packed, start, outputs
                )
                start += outputs
        return known


def packed_now(weights, rows):
    """What is packed of `Weights` as they are now, nothing of `None`."""
    return [] if weights is None else weights.arrays(rows)
