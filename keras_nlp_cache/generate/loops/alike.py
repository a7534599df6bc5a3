"""Blocks that are alike are traced once, each with weights of its own.

To trace a model is Python, once for each of its layers, every time that a
process starts: what compilers keep from one process to the next does not save
it. The blocks of a model differ in their weights and in nothing else, so that
what was traced of the first is called for all of them, or copied on PyTorch.

The weights of a block are arguments of that function, so they stay as live as
they are. Whether blocks are alike is not assumed: all that they hold is
compared, and what cannot be compared makes a block one of its own.
"""

import contextlib
import contextvars
import functools

import keras
import numpy as np
from keras import ops
from keras import tree
from keras.src.backend.common.variables import AutocastScope

from keras_nlp_cache.layers.sharing import attributes

# What differs between layers that compute the same.
_NAMES = frozenset(
    {
        "_auto_config",
        "_call_signature",
        "_called",
        "_name",
        "_parent_path",
        "_path",
        "name",
    }
)
# Whose layers do not look at their names.
_KNOWN = ("keras", "keras_hub", "keras_nlp_cache")

# What may come with tensors. It is part of what is traced.
_FIXED = (type(None), bool, int, float, str)

_traces = contextvars.ContextVar("keras_nlp_cache_traces", default=None)


@contextlib.contextmanager
def tracing_once(carried=()):
    """In this scope, blocks that are alike are traced once.

    To be entered within what is traced: nothing is kept for the next trace.

    Args:
        carried: What else is known of variables in this scope, `Carried`s.
    """
    token = _traces.set(({}, carried))
    try:
        yield
    finally:
        _traces.reset(token)


class Carried:
    """What a scope knows of variables, beside their values.

    It has to go with the weights of each block, or a block would be computed
    with that of another.
    """

    def of(self, variables):
        """What is known of variables.

        Args:
            variables: List of `keras.Variable`s, those of a block.

        Returns:
            Tensors in any structure, the same for blocks that are alike.
        """
        raise NotImplementedError

    def as_of(self, variables, known):
        """A scope in which this is what is known of variables.

        Args:
            variables: List of `keras.Variable`s.
            known: As from `of()`, with other tensors.
        """
        raise NotImplementedError


def call_block(block, call, args, kwargs):
    """Calls a block, as it is or as one that is like it.

    Args:
        block: A layer.
        call: Function from a layer, `args` and `kwargs` to what that returns.
        args: Tuple of positional arguments.
        kwargs: Dictionary of keyword arguments.

    Returns:
        What `call(block, args, kwargs)` returns.
    """
    if _traces.get() is None:
        return call(block, args, kwargs)
    traces, carried = _traces.get()
    leaves = tree.flatten((args, kwargs))
    tensors = [x for x in leaves if ops.is_tensor(x)]
    fixed = [None if ops.is_tensor(x) else (x,) for x in leaves]
    variables, description = describe(block)
    known = set(map(id, variables))
    if not all(x is None or isinstance(x[0], _FIXED) for x in fixed) or not all(
        id(x) in known for x in block.variables
    ):
        return call(block, args, kwargs)
    key = (
        description,
        tuple((tuple(x.shape), str(x.dtype)) for x in tensors),
        # What is no tensor is small, such as `None` or a bool.
        repr((tree.map_structure(lambda _: None, (args, kwargs)), fixed)),
    )
    if key not in traces:
        traces[key] = _Traced(
            call, block, variables, (args, kwargs), fixed, carried
        )
    return traces[key](variables, tensors)


class _Traced:
    """A call of a block, traced, for all blocks that are like it."""

    def __init__(self, call, block, variables, arguments, fixed, carried):
        self._call = functools.partial(call, block)
        self._variables = variables
        self._arguments = arguments
        self._fixed = fixed
        self._carried = carried
        self._compiled = _as_one_function(self._run)

    def __call__(self, variables, tensors):
        with AutocastScope(None):
            # As they are kept. What reads them casts them.
            values = [x.value for x in variables]
        known = [x.of(variables) for x in self._carried]
        outputs, assigned = self._compiled(values, known, tensors)
        for i, value in zip(self._assigned, assigned, strict=True):
            variables[i].assign(value)
        outputs = iter(outputs)
        return tree.pack_sequence_as(
            self._structure,
            [next(outputs) if x is None else x[0] for x in self._fixed_outputs],
        )

    def _run(self, values, known, tensors):
        tensors = iter(tensors)
        args, kwargs = tree.pack_sequence_as(
            self._arguments,
            [next(tensors) if x is None else x[0] for x in self._fixed],
        )
        mapping = list(zip(self._variables, values, strict=True))
        with contextlib.ExitStack() as stack:
            for x, tensors_of_it in zip(self._carried, known, strict=True):
                stack.enter_context(x.as_of(self._variables, tensors_of_it))
            scope = stack.enter_context(keras.StatelessScope(mapping))
            outputs = self._call(args, kwargs)
        self._structure = tree.map_structure(lambda _: None, outputs)
        leaves = tree.flatten(outputs)
        self._fixed_outputs = [
            None if ops.is_tensor(x) else (x,) for x in leaves
        ]
        now = [scope.get_current_value(x) for x in self._variables]
        self._assigned = [
            i for i, (x, y) in enumerate(zip(now, values)) if x is not y
        ]
        return [x for x in leaves if ops.is_tensor(x)], [
            now[i] for i in self._assigned
        ]


def _as_one_function(function):
    """A function that what is being traced calls, rather than repeats."""
    if keras.config.backend() == "jax":
        import jax

        # JAX looks up what it has traced by the function.
        return jax.jit(lambda *args: function(*args))
    if keras.config.backend() == "torch":
        from keras_nlp_cache.generate.loops.torch_copies import Copied

        return Copied(function)
    import tensorflow as tf

    # TensorFlow would put the body in place of each call first, and translate
    # each for XLA.
    compiled = tf.function(
        function,
        autograph=False,
        experimental_attributes={"_noinline": True},
    )
    # Of variables, it would translate the function anew for each.
    return lambda *args: compiled(
        *tree.map_structure(tf.convert_to_tensor, args)
    )


# === What is alike ===


def describe(layer):
    """What a layer computes, but for the values of its variables.

    Args:
        layer: A `keras.layers.Layer`.

    Returns:
        `(variables, description)`: its variables in an order, and what is
        hashable and equal for layers that compute the same with the same
        values in these.
    """
    description = _Description()
    told = description.of(layer)
    return description.variables, told


class _Description:
    def __init__(self):
        self.variables = []
        self._seen = {}

    def of(self, x):
        if x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
            return type(x), x
        if isinstance(x, np.ndarray) and x.dtype != object:
            return np.ndarray, x.shape, x.dtype.str, x.tobytes()
        if isinstance(x, (list, tuple)):
            return type(x), tuple(self.of(y) for y in x)
        if isinstance(x, dict):
            return type(x), tuple(
                (self.of(k), self.of(y)) for k, y in x.items()
            )
        if isinstance(x, (set, frozenset)):
            return type(x), frozenset(self.of(y) for y in x)
        if id(x) in self._seen:
            return "again", self._seen[id(x)]
        if isinstance(x, keras.Variable):
            self._seen[id(x)] = len(self._seen)
            self.variables.append(x)
            return type(x), tuple(x.shape), x.dtype, x.trainable
        if isinstance(x, functools.partial):
            return type(x), self.of((x.func, x.args, x.keywords))
        package, *_ = type(x).__module__.split(".")
        if package not in _KNOWN:
            return "this one", id(x)
        if isinstance(x, keras.initializers.Initializer):
            return type(x)
        if isinstance(x, (keras.layers.Layer, keras.random.SeedGenerator)):
            self._seen[id(x)] = len(self._seen)
            return type(x), self._of_attributes(x)
        if isinstance(x, keras.layers.InputSpec):
            return type(x), self.of(vars(x))
        if isinstance(x, (keras.DTypePolicy, keras.Quantizer)):
            return type(x), self.of(x.get_config())
        return "this one", id(x)

    def _of_attributes(self, x):
        if isinstance(x, keras.random.SeedGenerator):
            # Seeds are what it begins with. What follows is in its state.
            return self.of(x.state)
        return tuple(
            (name, self.of(value))
            for name, value in sorted(attributes(x).items())
            if name not in _NAMES
        )
