"""Mixtures of experts that read the experts they chose, and no others.

Upstream's blocks multiply every token with every expert and weigh most of the
results with zero. That is what training needs, and costs a decode step all the
weights of the model. `SparseBlock` finds out which experts upstream's router
will choose, and `ExpertBank` runs upstream's own code on their weights alone.
What upstream makes of it (how it weighs, what it shares, what it adds to the
loss) stays its own.
"""

import contextlib
import weakref

import keras
from keras import ops
from keras.src.backend.common.variables import AutocastScope
from keras.src.ops.numpy import Einsum

from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers import sharing
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.specializing import Specialized

# By banks, what was traced, and the attributes that they had.
_traces = weakref.WeakKeyDictionary()


class Chosen:
    """Which experts the tokens of a call chose.

    Attributes:
        experts: int32 tensor `(n,)`. The experts, without repetition in the
            first `count` places. The others hold the first one again.
        count: int or int32 scalar. How many different ones there are.
    """

    def __init__(self, choices, num_experts):
        """Collects choices.

        Args:
            choices: int tensor `(tokens, top_k)`.
            num_experts: int.
        """
        tokens, top_k = choices.shape
        choices = ops.reshape(ops.cast(choices, "int32"), (-1,))
        self.experts, self.count = choices, top_k
        if tokens > 1:
            every = ops.arange(num_experts, dtype="int32")
            chosen = ops.any(choices[:, None] == every[None, :], axis=0)
            ordered = ops.sort(ops.where(chosen, every, num_experts))
            ordered = ordered[: min(tokens * top_k, num_experts)]
            self.experts = ops.where(
                ordered < num_experts, ordered, ordered[:1]
            )
            self.count = ops.sum(ops.cast(chosen, "int32"))


class SparseBlock(Specialized):
    """Mixin for upstream's block of a router and experts.

    Placed before the upstream class in the bases of a layer of the same name.
    In a cached call of few tokens, only the experts that one of them chose are
    computed.

    Its layer of experts is to be an `ExpertBank`.
    """

    def router_scores(self, x):
        """What upstream's code takes the largest of, to choose experts.

        Args:
            x: Tensor `(tokens, hidden_dim)`.

        Returns:
            A tensor `(tokens, num_experts)`. Rounded as upstream's is: what is
            equal there is to be equal here.
        """
        return ops.softmax(self._sparse_feedforward_gate_dense(x), axis=-1)

    def call(self, *args, **kwargs):
        x = first_argument(args, kwargs)
        # Upstream may add noise to what it trains the router on.
        if kwargs.get("training") or not have_few_choices(
            x, self.top_k, self.num_experts
        ):
            return super().call(*args, **kwargs)
        scores = self.router_scores(ops.reshape(x, (-1, x.shape[-1])))
        with choosing(scores, self.top_k):
            return super().call(*args, **kwargs)


def have_few_choices(x, top_k, num_experts):
    """Whether it is quicker to compute the experts that tokens choose alone.

    Args:
        x: Tensor `(B, T, hidden_dim)`, in the block under way.
        top_k: int. How many experts a token chooses.
        num_experts: int.
    """
    call = block_call.current()
    if call is None or not call.is_cached:
        return False
    batch, length, _ = x.shape
    # In a graph, there may be no saying.
    if not isinstance(batch, int) or not isinstance(length, int):
        return False
    return batch * length * top_k < access().most_choices * num_experts


@contextlib.contextmanager
def choosing(scores, top_k):
    """In this scope, an `ExpertBank` computes only what tokens choose.

    Args:
        scores: Tensor `(tokens, num_experts)`. Tokens choose the largest.
        top_k: int. How many of them.
    """
    call = block_call.current()
    choices = ops.top_k(scores, k=top_k)[1]
    call.chosen = Chosen(choices, scores.shape[-1])
    try:
        yield
    finally:
        call.chosen = None


class ExpertBank(Specialized):
    """Mixin for upstream's layer that holds the weights of all experts.

    Placed before the upstream class in the bases of a layer of the same name.
    The first axis of each of its variables has to be that of the experts, and
    the first axis of what it returns, too. What upstream computes from them is
    found out by calling it once on symbolic tensors.
    """

    def call(self, hidden_states):
        """Computes all experts as upstream does, or those chosen.

        Returns:
            A tensor `(num_experts, tokens, hidden_dim)`, zero for an expert
            that no token chose.
        """
        call = block_call.current()
        if call is None or call.chosen is None:
            return super().call(hidden_states)
        compute = access().experts or together
        formula = _Formula(self, super().call)
        return compute(formula, hidden_states, call.chosen)


class WeighedExperts(ExpertBank):
    """Mixin for one that weighs what experts return, and adds it up.

    Between it and upstream's class, there has to be one whose `call(x)` returns
    what each expert does, as an `ExpertBank` needs it, and that leaves to
    upstream's a call with weights.
    """

    def call(self, x, dispatch_weights):
        """Computes experts, and adds them up.

        Args:
            x: Tensor `(tokens, hidden_dim)`.
            dispatch_weights: Tensor `(tokens, num_experts)`.

        Returns:
            A tensor `(tokens, hidden_dim)`.
        """
        call = block_call.current()
        if call is None or call.chosen is None:
            return super(ExpertBank, self).call(x, dispatch_weights)
        weights = ops.cast(ops.transpose(dispatch_weights), x.dtype)
        return ops.sum(super().call(x) * weights[:, :, None], axis=0)


def together(formula, hidden_states, chosen, product=None):
    """Computes all chosen experts at once, on copies of their weights.

    Args:
        formula: What an `ExpertBank` computes.
        hidden_states: Tensor `(tokens, hidden_dim)`.
        chosen: `Chosen`.
        product: Optional function that multiplies without a copy, from a
            tensor, all weights and `chosen`. See `torch_product.product()`.

    Returns:
        A tensor `(num_experts, tokens, hidden_dim)`.
    """
    output = formula(
        hidden_states,
        lambda x: ops.take(x, chosen.experts, axis=0),
        product and (lambda x, weights: product(x, weights, chosen)),
    )
    shape = (formula.num_experts, *hidden_states.shape)
    return ops.scatter_update(
        ops.zeros(shape, output.dtype), chosen.experts[:, None], output
    )


def sliced(x, expert):
    """Of the weights of all experts, those of one, `(1, ...)`."""
    rest = [0] * (len(x.shape) - 1)
    return ops.slice(x, start_at(expert, *rest), (1, *x.shape[1:]))


def one_by_one(formula, hidden_states, chosen, read=sliced):
    """Computes one expert after the other, where XLA would copy all at once.

    Takes and returns what `together()` does. There is no gradient.

    Args:
        formula: As for `together()`.
        hidden_states: As for `together()`.
        chosen: As for `together()`.
        read: What reads the weights of an expert, as `sliced()` does.
    """

    def body(i, outputs):
        expert = chosen.experts[i]
        output = formula(hidden_states, lambda x: read(x, expert))
        return ops.scatter_update(outputs, expert[None, None], output)

    shape = (formula.num_experts, *hidden_states.shape)
    outputs = ops.zeros(shape, formula.dtype)
    return ops.fori_loop(0, chosen.count, body, outputs)


class _Formula:
    """What a bank computes from tokens and the weights of some experts.

    Upstream writes products such as `"th,ehm->etm"`, for which all backends
    first transpose the weights. In a graph they are known as what they are:
    one product for each expert.

    Args:
        bank: An `ExpertBank`.
        upstream_call: Its `call()`, as upstream wrote it.

    Attributes:
        num_experts: int.
        dtype: Dtype of what is computed.
    """

    def __init__(self, bank, upstream_call):
        self.num_experts = bank.num_experts
        self.dtype = bank.compute_dtype
        # Not all of them are to be cast before some are chosen.
        with AutocastScope(None):
            self._values = {id(x): _read(x) for x in bank.variables}
            self._graph, self._biases = self._traced(bank, upstream_call)

    def _traced(self, bank, upstream_call):
        """`keras.Function` and the variables that it takes beside tokens."""
        now = sharing.attributes(bank)
        before, *traced = _traces.get(bank, ({},))
        if before.keys() == now.keys():
            if all(before[name] is now[name] for name in now):
                return traced
        stand_ins = {}

        def stand_in(variable):
            if id(variable) not in self._values:
                return None
            shape = None, *variable.shape[1:]
            return stand_ins.setdefault(
                id(variable), keras.KerasTensor(shape, self.dtype)
            )

        x = keras.KerasTensor((None, bank.hidden_dim), self.dtype)
        with _Reading(stand_in):
            output = upstream_call(x)
        graph = keras.Function([x, *stand_ins.values()], output)
        _traces[bank] = now, graph, tuple(stand_ins)
        return graph, tuple(stand_ins)

    def __call__(self, x, choose, product=None):
        """Computes the chosen experts.

        Args:
            x: Tensor `(tokens, hidden_dim)`.
            choose: Function from all experts' values of a variable to those of
                the chosen ones, in one order.
            product: Optional function that does without: from a tensor
                `(1 or n, T, K)` and all weights, `(num_experts, K, N)`, to the
                products `(n, T, N)` with the chosen ones.

        Returns:
            A tensor `(n, tokens, hidden_dim)`.
        """

        def read(variable):
            value = self._values.get(id(variable))
            return None if value is None else choose(value)

        def operation(operation):
            if not isinstance(operation, Einsum):
                return operation
            return lambda *operands: self._einsum(
                operation.subscripts, operands, product
            )

        with _Reading(read):
            biases = [
                ops.cast(choose(self._values[key]), self.dtype)
                for key in self._biases
            ]
            return self._graph._run_through_graph(
                [x, *biases], operation_fn=operation
            )

    def _einsum(self, equation, operands, product):
        terms, result = equation.replace(" ", "").split("->")
        terms = terms.split(",")
        places = [
            i for i, x in enumerate(operands) if isinstance(x, keras.Variable)
        ]
        if len(operands) != 2 or len(places) != 1 or "." in equation:
            return ops.einsum(equation, *operands)
        (place,) = places
        x, weights = operands[1 - place], operands[place]
        term, of_weights = terms[1 - place], terms[place]
        expert = of_weights[0]
        if expert not in term:
            term, x = expert + term, x[None]
        is_matrix_product = (
            len(term) == len(of_weights) == 3
            and term[0] == expert
            and term[2] == of_weights[1]
            and result == expert + term[1] + of_weights[2]
        )
        if product is not None and is_matrix_product:
            return product(x, self._values[id(weights)])
        weights = weights.value
        if term[0] == expert and x.shape[0] != weights.shape[0]:
            x = ops.broadcast_to(x, (weights.shape[0], *x.shape[1:]))
        return ops.einsum(f"{term},{of_weights}->{result}", x, weights)


class _Reading(keras.StatelessScope):
    """In this scope, variables have the values that a function says.

    Args:
        read: Takes a variable, and returns a value or `None` for its own.
    """

    def __init__(self, read):
        super().__init__()
        self._read = read

    def get_current_value(self, variable):
        return self._read(variable)


def _read(variable):
    """The value of a variable, as a tensor.

    Once TensorFlow has gathered from a variable, it copies all of it whenever
    it is read, by whomever.
    """
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(variable.value)
    return variable.value
