"""A functional model with a cache among its inputs: how it is called."""

import keras
from keras import ops
from keras import tree

from keras_nlp_cache.cache import policies
from keras_nlp_cache.cache.int8 import Int8
from keras_nlp_cache.cache.kept import has_policy
from keras_nlp_cache.cache.policies.state import State
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.cache.shared_keys import SharedKeys
from keras_nlp_cache.graph.inputs import normalize
from keras_nlp_cache.graph.roles import TEXT


def plain_python(function):
    """Keeps TensorFlow's autograph from rewriting a function.

    It would turn checks of Python values into graph operations.
    """
    if keras.config.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def floating_dtype(name, dtype):
    """The standard name of a dtype.

    Raises:
        ValueError: If it is not floating. `name` says which argument it was.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            f"Expected `{name}` to be a floating dtype. Received: {dtype}."
        )
    return dtype


def flatten(x):
    """Does what `tree.flatten()` does, but for what a policy keeps.

    In a graph, that stands for one tensor, whatever it is made of, and so does
    what one layer reads and others read, too.
    """
    if isinstance(x, dict):
        x = [x[key] for key in sorted(x)]
    elif not isinstance(x, (list, tuple)) or isinstance(x, Int8):
        return [x]
    elif has_policy(x) or isinstance(x, SharedKeys):
        return [x]
    return [z for y in x for z in flatten(y)]


def dense(x):
    """Corrects what Keras says of a symbolic product with a number.

    It calls it sparse (`keras.ops.multiply` in 3.15), and layers that infer
    their output shape from it then fail.
    """
    if isinstance(x, keras.KerasTensor):
        x._sparse = False
    return x


def _has_nothing_to_do(node, values):
    """Whether what an operation is called on was not computed, nor given.

    So a graph stops where its inputs are `None`: it runs without its encoder,
    or without its decoder. A layer may be called without what comes second.
    """
    if getattr(node.operation, "called_on_nothing", False):
        return False
    needed = node.input_tensors
    if isinstance(node.operation, keras.layers.Layer):
        needed = needed[:1]
    return any(values[id(x)] is None for x in needed)


def _value_of(x, values):
    """Computes a tensor of a graph.

    Args:
        x: Symbolic tensor.
        values: Dictionary from the `id()` of symbolic tensors to what they are.
            Gets what is computed.
    """
    if id(x) not in values:
        history = x._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        for y in node.input_tensors:
            _value_of(y, values)
        outputs = [None] * len(node.outputs)
        if not _has_nothing_to_do(node, values):
            args, kwargs = node.arguments.fill_in(values)
            outputs = flatten(history.operation(*args, **kwargs))
        values.update(zip(map(id, node.outputs), outputs))
    return values[id(x)]


class CallWithCache(keras.layers.Layer):
    """A symbolic call of a model with a cache, in a graph of a user's.

    Keras takes the number of a call's outputs from `layer.output`. That of the
    model is its hidden states alone, that of this layer is what the call
    returns.

    Args:
        model: A model that is a `CachedGraph`.
    """

    def __init__(self, model):
        super().__init__(name=f"{model.name}_with_cache", autocast=False)
        self.model = model

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def compute_output_spec(self, inputs, training=None):
        return self.model.compute_output_spec(inputs)


class CachedGraph:
    """Mixin for a functional model whose graph a `Wiring` made.

    The model takes a dictionary in which all but `"token_ids"` may be left out,
    and returns hidden states, with the cache if one came in.

    Attributes:
        roles: `Roles`, what inputs are called.
    """

    roles = TEXT

    @property
    def max_positions(self):
        """Number of positions the model can tell apart, `None` if any."""
        return None

    @plain_python
    def make_cache(
        self, batch_size, max_length, dtype=None, policy=None, zeros=ops.zeros
    ):
        """Makes an empty cache.

        Args:
            batch_size: int. Number of sequences.
            max_length: int. Number of slots, the longest sequence that fits.
            dtype: Optional floating dtype. Defaults to the compute dtype.
            policy: Which tokens are kept, and how: `"full"`, all of them, the
                default; `"rotating"`, of layers with a window only as many as
                that; `"int8"`, all in eight bits a number; or a policy of
                `keras_nlp_cache.cache.policies`.
            zeros: Function from a shape and a dtype to a tensor, for who has
                one to write over.

        Returns:
            A tuple with one `(key, value)` pair per layer that remembers. By
            default each is a tensor of zeros `(batch_size, key_value_heads,
            max_length, head_dim)`, otherwise what the policy makes. A layer
            with a state has a `State` in place of each, whatever the policy.

        Raises:
            ValueError: If a size is not a positive integer, if `max_length`
                exceeds the positions of the model, if `dtype` is not floating,
                or if there is no such policy, or none for this model.
        """
        self.check_cache_size(batch_size, max_length)
        dtype = floating_dtype("dtype", dtype or self.compute_dtype)
        policy = policies.get(policy)
        policy.check(self)

        def make(spec, window):
            if isinstance(spec, StateShapes):
                return tuple(
                    State.empty((batch_size, *shape), zeros) for shape in spec
                )
            heads, dim = spec
            shape = batch_size, heads, max_length, dim
            return tuple(
                policy.make(shape, dtype, window, zeros) for _ in range(2)
            )

        return tuple(map(make, self.cache_spec, self.cache_windows))

    def check_cache_size(self, batch_size, max_length):
        """Raises what `make_cache()` raises for sizes that it cannot make."""
        for name, size in (
            ("batch_size", batch_size),
            ("max_length", max_length),
        ):
            if ops.is_tensor(size):
                continue  # Sizes are tensors in a TensorFlow graph.
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise ValueError(
                    f"Expected `{name}` to be an integer. Received: {size!r} "
                    f"of type {type(size).__name__}."
                )
            if size < 1:
                raise ValueError(
                    f"Expected `{name}` to be 1 or more. Received: {size}."
                )
        if self.max_positions is not None and not ops.is_tensor(max_length):
            if max_length > self.max_positions:
                raise ValueError(
                    "Expected `max_length` to be at most the "
                    f"{self.max_positions} positions that the model learned "
                    f"(`max_sequence_length`). Received: {max_length}."
                )

    @property
    def cache_spec(self):
        """One `(key_value_heads, head_dim)` per entry of the cache.

        `StateShapes` of an entry that is a state.
        """
        return tuple(
            (key.shape[1], key.shape[3])
            if None in key.shape[1:]
            else StateShapes(key.shape[1:], value.shape[1:])
            for key, value in self._inputs_struct["cache"]
        )

    @property
    def has_states(self):
        """Whether layers keep states: then a text cannot go back."""
        return any(isinstance(x, StateShapes) for x in self.cache_spec)

    @property
    def takes_generated(self):
        """Whether there is an optional input `generated`, as after some edits.

        int, `(B, T)`, not 0 where the token that follows is generated.
        """
        return "generated" in self._inputs_struct

    def _normalize(self, inputs):
        further = ("generated",) if self.takes_generated else ()
        return normalize(
            inputs, self.cache_spec, self.max_positions, further, self.roles
        )

    @plain_python
    def __call__(self, inputs, *args, **kwargs):
        inputs = self._normalize(inputs)
        # A state, or what a policy keeps, is a structure of tensors.
        first, *_ = tree.flatten(inputs["cache"][0][0])
        if isinstance(first, keras.KerasTensor):
            return CallWithCache(self)(inputs, *args, **kwargs)
        return super().__call__(inputs, *args, **kwargs)

    def _assert_input_compatibility(self, *args):
        # It is, by now. Keras would take what a policy keeps for inputs.
        pass

    def call(self, inputs, training=None, mask=None, **kwargs):
        # Again, since `stateless_call` does not come through `__call__`.
        inputs = self._normalize(inputs)
        return self._outputs_for(
            inputs,
            *super().call(inputs, training=training, mask=mask, **kwargs),
        )

    def _outputs_for(self, inputs, hidden_states, cache):
        """What the model returns, of what its graph does."""
        if inputs["cache"][0][0] is None:
            return hidden_states
        return hidden_states, cache

    def compute_output_spec(self, inputs, training=None, mask=None):
        """The hidden states, with the cache if one came in."""
        inputs = self._normalize(inputs)

        def spec(x):
            return self._output_spec(inputs, x)

        hidden_states, _, *further = self._outputs_struct
        cache = tree.map_structure(
            lambda x: x if x is None else keras.KerasTensor(x.shape, x.dtype),
            inputs["cache"],
        )
        return self._outputs_for(
            inputs,
            self._output_spec(inputs, hidden_states),
            cache,
            *tree.map_structure(spec, further),
        )

    def _output_spec(self, inputs, x):
        """What is returned for some inputs, like a symbolic tensor."""
        shape = (*inputs[self.roles.token_ids].shape, *x.shape[2:])
        return keras.KerasTensor(shape, dtype=x.dtype)

    def _run_through_graph(
        self, inputs, operation_fn=lambda op: op, call_fn=None
    ):
        # Keras' own runs on what `inputs` lists, and takes the number of a
        # call's outputs from the first call of a layer, which for a block is
        # one without a cache.
        values = dict(zip(map(id, self._inputs), flatten(inputs)))
        for depth in sorted(self._nodes_by_depth, reverse=True):
            for node in self._nodes_by_depth[depth]:
                if any(id(x) not in values for x in node.input_tensors):
                    continue
                if node.is_input:
                    continue
                outputs = node.outputs
                if call_fn is None:
                    call = operation_fn(node.operation)
                    if _has_nothing_to_do(node, values):
                        outputs = [None] * len(node.outputs)
                    else:
                        args, kwargs = node.arguments.fill_in(values)
                        outputs = call(*args, **kwargs)
                values.update(zip(map(id, node.outputs), flatten(outputs)))
        if any(id(x) not in values for x in self._outputs):
            raise ValueError(
                "Expected all outputs of the graph to be computed from its "
                f"inputs, {[x.name for x in self._inputs]}. Received outputs "
                "that depend on the inputs of another graph."
            )
        return tree.map_structure(lambda x: values[id(x)], self._outputs_struct)

    def nodes_of_kind(self, kind):
        """The calls of layers of one class in the graph, as Keras' nodes."""
        return [
            node
            for nodes in self._nodes_by_depth.values()
            for node in nodes
            if type(node.operation) is kind
        ]

    def values_of(self, tensors, inputs):
        """Computes tensors of the graph, and nothing that follows them.

        Args:
            tensors: Symbolic tensors of the graph, or `None`.
            inputs: Dictionary of all inputs, as tensors or `None`.

        Returns:
            A list of what they are.
        """
        values = dict(zip(map(id, self._inputs), flatten(inputs)))
        return [None if x is None else _value_of(x, values) for x in tensors]

    def _standardize_inputs(self, inputs):
        # Keras would cast each input to the dtype that the graph declares,
        # and with it a cache made in another dtype on request.
        return flatten(inputs)

    @property
    def input(self):
        """The symbolic inputs that upstream's backbone has too."""
        return {
            name: self._inputs_struct[name] for name in self.roles.of_upstream
        }

    @property
    def inputs(self):
        """`input`, in a list."""
        return tree.flatten(self.input)
