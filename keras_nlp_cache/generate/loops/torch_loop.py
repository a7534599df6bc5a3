"""Generation on PyTorch: an eager prefill, a captured decode step."""

import contextlib
import dataclasses
import functools
import itertools
import operator
import threading
import typing

import keras
import torch
from keras import tree
from torch.utils import _pytree as pytree

from keras_nlp_cache.cache.policies.state import is_state
from keras_nlp_cache.generate.loops.generation import Loop
from keras_nlp_cache.generate.loops.generation import tokens_from
from keras_nlp_cache.generate.loops.torch_capture import capture
from keras_nlp_cache.generate.loops.torch_capture import multiplies
from keras_nlp_cache.generate.loops.torch_capture import separate_views
from keras_nlp_cache.generate.loops.torch_fusing import fuse
from keras_nlp_cache.generate.loops.torch_products import dense_product
from keras_nlp_cache.generate.loops.torch_products import DenseProducts
from keras_nlp_cache.generate.loops.torch_products import opaque_dense_product
from keras_nlp_cache.kernels.torch_threads import all_threads
from keras_nlp_cache.kernels.torch_threads import one_thread
from keras_nlp_cache.products.finding import find_weights
from keras_nlp_cache.products.multiplying import multiplying_with
from keras_nlp_cache.products.packing import packed_now
from keras_nlp_cache.products.sources import reader


def record(function, states=()):
    """Records what a function does on a GPU, to launch it all at once.

    Args:
        function: Takes no arguments. Reads and writes the same memory whenever
            it is called. But for `states`, it may be called twice in place of
            once.
        states: List of tensors that are afterwards as they were.

    Returns:
        A function that does the same again, and returns the same tensor.

    Reference:
        https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    # Libraries set themselves up in the first call, which can't be recorded.
    before = [x.clone() for x in states]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(states, before):
        x.copy_(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay():
        graph.replay()
        return output

    return replay


@contextlib.contextmanager
def inference():
    """Without gradients, and with tensors that may be written to later.

    Those made in `torch.inference_mode()` may not outside of it, where a
    session may go on.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def operator_choices(device):
    """What PyTorch was told that decides which operators a function calls.

    What they do when they run, such as in which precision they multiply or
    whether always in the same order, is not part of it. Gradients are not
    either: see `inference()`.

    Args:
        device: `torch.device`. Where the function runs.
    """
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


@dataclasses.dataclass
class _Bound:
    """A step on a cache and on weights, and the tensors that it is for."""

    step: typing.Any = None
    cache: typing.Any = None
    of_cache: list = ()
    bound_to: list = ()
    choices: tuple = None


class EagerTorchLoop(Loop):
    """Generation that calls the layers of the model once per token."""

    def _prefill(self, *args):
        with inference():
            return super()._prefill(*args)

    def _prefill_more(self, *args):
        with inference():
            return super()._prefill_more(*args)

    def _decode(self, *args):
        with inference():
            return super()._decode(*args)

    def _verify(self, *args):
        with inference():
            return super()._verify(*args)

    def evaluate(self, function, *args):
        with inference():
            return function(*args)

    def _read_more_source(self, *args):
        with inference():
            return super()._read_more_source(*args)

    def new_cache(self, batch, slots):
        with inference():
            return super().new_cache(batch, slots)

    def put_row(self, cache, row, row_cache):
        with inference():
            for x, y in zip(tree.flatten(cache), tree.flatten(row_cache)):
                x[row].copy_(y[0])
        return cache

    def restore_cache(self, arrays):
        with inference():
            return super().restore_cache(arrays)


class TorchLoop(EagerTorchLoop):
    """Generation that calls the layers of the model once, not once per token.

    The prefill runs eagerly, for prompts of any length. The model's part of a
    decode step is captured for each size of the cache, and again where PyTorch
    would choose other operators, as in `torch.autocast`. Weights are arguments
    of what is captured, so that new ones are seen.

    On a GPU the operators of a step are recorded and launched as one. With
    `jit_compile=True`, what was captured is compiled by Inductor, which needs a
    C++ compiler.
    """

    @staticmethod
    def is_gpu(device):
        """Whether to record what runs on a device."""
        return device.type == "cuda"

    def __init__(self, lm):
        super().__init__(lm)
        self.own_products = find_weights(lm)
        self._read = reader(self.variables)
        self._captured, self._bound = {}, {}
        self._capturing = threading.Lock()

    @property
    def compilations(self):
        return len(self._captured)

    def _prefill_more(self, token_ids, length, cache, start):
        rows = len(token_ids) * min(self.chunk, int(length) - 1 - int(start))
        packed = packed_now(self.own_products, rows)
        with DenseProducts(), multiplying_with(self.own_products, packed):
            return super()._prefill_more(token_ids, length, cache, start)

    def _decode(self, *args):
        with self._threads():
            return super()._decode(*args)

    def _verify(self, *args):
        with self._threads():
            return super()._verify(*args)

    def _threads(self):
        """A scope in which kernels of our own have the cores to themselves."""
        return (
            contextlib.nullcontext()
            if self.own_products is None
            else (one_thread())
        )

    def keep(self, cache):
        # What is bound to it is of no use without it.
        first = pytree.tree_leaves(cache)[0]
        for key, bound in list(self._bound.items()):
            if bound.bound_to[0] is first:
                self._bound.pop(key, None)

    def _make_call(self, length=1):
        def call(generation):
            cache = generation.cache
            index = self._index(generation, length)
            now = tokens_from(generation.token_ids, generation.index, length)
            further = self._further_inputs(now)
            step = self._bound_step(length, now, index, cache, further)
            return step(now, index, further), cache

        return call

    def _bound_step(self, length, tokens, index, cache, further):
        """A step on this cache and these weights, the last one if it is."""
        weights = self._weights(tokens.numel())
        values, packed = weights
        key = length, index.ndim, threading.get_ident()
        before = self._bound.get(key, _Bound())
        # To flatten it takes longer than some of a step.
        of_cache = before.of_cache
        if cache is not before.cache:
            of_cache = tree.flatten(cache)
        bound_to = [*of_cache, *values, *itertools.chain(*packed)]
        choices = operator_choices(tokens.device)
        if (
            choices == before.choices
            and len(bound_to) == len(before.bound_to)
            and all(map(operator.is_, bound_to, before.bound_to))
        ):
            before.cache = cache
            return before.step
        step = self._bind(weights, tokens, index, cache, further)
        self._bound[key] = _Bound(step, cache, of_cache, bound_to, choices)
        return step

    def _weights(self, rows):
        """The values of all variables, and what is packed for some rows."""
        return self._read(), packed_now(self.own_products, rows)

    def _bind(self, weights, tokens, index, cache, further):
        """A step from tokens to logits, on some weights and a cache."""
        token = torch.zeros_like(tokens)
        slot = torch.zeros_like(index)
        inputs = pytree.tree_map(torch.clone, further)
        arguments = token, cache, slot, inputs
        prepare, module = self._captured_step(weights, *arguments)
        leaves = [
            *prepare(*pytree.tree_leaves(weights)),
            *pytree.tree_leaves(arguments),
        ]
        step, threads = None, contextlib.nullcontext
        if multiplies(module):
            threads = all_threads
        states = [x.stored for pair in cache for x in pair if is_state(x)]

        def bound_step(new_token, index, further):
            nonlocal step
            token.copy_(new_token)
            slot.copy_(index)
            for name, x in further.items():
                inputs[name].copy_(x)
            # What autocasting does was captured.
            with torch.autocast(token.device.type, enabled=False), threads():
                if step is None:
                    # Not before: it runs the step, which writes into the cache.
                    step, output = self._recorded(module, leaves, states)
                    return output
                return step()

        return bound_step

    def _recorded(self, module, arguments, states):
        """Runs a step that reads and writes the same memory each time.

        Returns:
            A tuple of what runs it again, and what it returned.
        """
        step = functools.partial(module, *arguments)
        if self.is_gpu(arguments[-1].device):
            step = record(step, states)
        elif self.own_products is not None and not self.lm.jit_compile:
            # Which takes numba to import.
            from keras_nlp_cache.generate.loops import torch_replay

            return torch_replay.record(module, arguments)
        return step, step()

    def _captured_step(self, weights, token_ids, cache, index, further):
        choices = operator_choices(token_ids.device)
        shapes = [tuple(x.shape) for x in pytree.tree_leaves(cache)]
        key = *token_ids.shape, index.ndim, *shapes, choices
        with self._capturing:
            if key not in self._captured:
                module = capture(
                    self._logits, weights, token_ids, cache, index, further
                )
                fixed = len(pytree.tree_leaves(weights))
                prepare, step = separate_views(module, fixed)
                if self.lm.jit_compile:
                    step = torch.compile(step, dynamic=False)
                elif self.own_products is not None:
                    # Which takes numba to import.
                    from keras_nlp_cache.generate.loops import torch_step_kernels

                    fuse(step, torch_step_kernels.kernel_of)
                self._captured[key] = prepare, step
            return self._captured[key]

    def _logits(self, weights, token_ids, cache, index, further):
        values, packed = weights
        mapping = list(zip(self.variables, values))
        products = DenseProducts(
            opaque_dense_product if self.lm.jit_compile else dense_product
        )
        with (
            keras.StatelessScope(state_mapping=mapping),
            multiplying_with(self.own_products, packed),
            products,
        ):
            logits, _, _ = self.lm.call_with_cache(
                token_ids, cache, index, **further
            )
            return logits
