"""Generation on PyTorch: an eager prefill, a captured decode step."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import operator
import sys
import threading
import typing

import keras
import torch
from keras import ops
from keras import tree
from keras.src.backend.torch.core import get_device
from keras_hub.samplers import GreedySampler
from torch.utils import _pytree as pytree

from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.cache.kept import spare
from keras_nlp_cache.device import constants
from keras_nlp_cache.garbage import collecting_none
from keras_nlp_cache.generate.loops.generation import decode_step
from keras_nlp_cache.generate.loops.generation import Loop
from keras_nlp_cache.generate.loops.generation import tokens_from
from keras_nlp_cache.generate.loops.spare_caches import SpareCaches
from keras_nlp_cache.generate.loops.torch_capture import capture
from keras_nlp_cache.generate.loops.torch_capture import multiplies
from keras_nlp_cache.generate.loops.torch_capture import separate_views
from keras_nlp_cache.generate.loops.torch_fusing import fuse
from keras_nlp_cache.generate.loops.torch_products import dense_product
from keras_nlp_cache.generate.loops.torch_products import DenseProducts
from keras_nlp_cache.generate.loops.torch_products import opaque_dense_product
from keras_nlp_cache.generate.loops.torch_recording import changing
from keras_nlp_cache.generate.loops.torch_recording import record
from keras_nlp_cache.generate.loops.torch_recording import StepsInPlace
from keras_nlp_cache.generate.loops.tracing import tracing_once
from keras_nlp_cache.kernels.torch_threads import all_threads
from keras_nlp_cache.kernels.torch_threads import one_thread
from keras_nlp_cache.products.finding import find_weights
from keras_nlp_cache.products.multiplying import multiplying_with
from keras_nlp_cache.products.packing import packed_now
from keras_nlp_cache.products.sources import reader


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


def _has_triton():
    """Whether Triton is there, and can be imported.

    After TensorFlow it cannot, both bring an LLVM: that ends the process.
    """
    if "triton" in sys.modules:
        return True
    if "tensorflow" in sys.modules:
        return False
    return importlib.util.find_spec("triton") is not None


@dataclasses.dataclass
class _Bound:
    """Steps on a cache and on weights, and the tensors that they are for."""

    steps: typing.Any = None
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

    The prefill runs eagerly, for prompts of any length. A decode step is
    captured for each size of the cache, or the model's part of it if a sampler
    draws, and again where PyTorch would choose other operators, as in
    `torch.autocast`. Weights are arguments of what is captured, so that new
    ones are seen.

    On a GPU the operators of a step are recorded and launched as one. Prompts
    are read like this in chunks of one size. The last caches are kept there,
    with what was recorded on them.

    With `jit_compile=True`, what was captured is compiled by Inductor, which
    needs a C++ compiler.
    """

    def __init__(self, lm):
        super().__init__(lm)
        self.own_products = find_weights(lm)
        self._read = reader(self.variables)
        self._captured, self._bound = {}, {}
        self._capturing = threading.Lock()
        self._spare_caches = SpareCaches()

    @property
    def records(self):
        """Whether steps are recorded, as on a GPU."""
        return get_device().startswith("cuda")

    @property
    def _picks_alone(self):
        """Whether what picks tokens can be captured with the model.

        Samplers that draw read their seed in Python.
        """
        return type(self.sampler) is GreedySampler

    @property
    def compiles_sampler(self):
        return self._picks_alone

    @property
    def reads_together(self):
        # Several rows would take a cache of their own, recorded for once.
        return not self._keeps_caches

    @property
    def _keeps_caches(self):
        # A state is to be zeros when a text begins.
        return self.records and not self.lm.backbone.has_states

    @property
    def compilations(self):
        return len(self._captured)

    def new_cache(self, batch, slots):
        if not self._keeps_caches:
            return super().new_cache(batch, slots)
        make_cache = functools.partial(self._make_cache, batch, slots)
        cache, other = self._spare_caches.take(batch, make_cache)
        self._unbind(other)
        del other  # Before there are two.
        return cache or super().new_cache(batch, slots)

    def keep(self, cache):
        if self._keeps_caches:
            cache = self._spare_caches.put(cache)
        self._unbind(cache)

    def _unbind(self, cache):
        """Forgets steps on a cache, if there is one: they need its memory."""
        if cache is None:
            return
        first = pytree.tree_leaves(cache)[0]
        for key, bound in list(self._bound.items()):
            if bound.bound_to[0] is first:
                self._bound.pop(key, None)

    def _prefill_more(self, token_ids, length, cache, start):
        if self._keeps_caches:
            start = self._read_recorded(token_ids, length, cache, start)
        rows = len(token_ids) * min(self.chunk, int(length) - 1 - int(start))
        packed = packed_now(self.own_products, rows)
        with DenseProducts(), multiplying_with(self.own_products, packed):
            return super()._prefill_more(token_ids, length, cache, start)

    def _read_recorded(self, token_ids, length, cache, start):
        """Reads a prompt in chunks of one size, each of them one launch.

        What is read past the prompt is written again before it counts, so what
        must not be read twice, a state, is not read like this.

        Returns:
            int. Up to where there was room for chunks.
        """
        slots = token_ids.shape[1]
        chunk = min(constants().compiled_chunk, slots, spare(cache) or slots)
        start, last = int(start), int(length) - 1
        with inference():
            token_ids = ops.convert_to_tensor(token_ids)
            index = torch.zeros_like(token_ids[0, 0])
            while start < last and start + chunk <= slots:
                tokens = token_ids[:, start : start + chunk]
                self._call(self._read_chunk, tokens, index + start, cache, {})
                start += chunk
        return min(start, last)

    def _decode(self, generation, bounds, values, structure):
        decode = super()._decode
        # What a user's function does may be done in Python, at each step.
        if self._picks_alone and structure.logits_processor is None:
            decode = self._decode_in_place
        with self._threads(), inference():
            return decode(generation, bounds, values, structure)

    def _decode_in_place(self, generation, bounds, values, structure):
        most = int(bounds.steps)
        arguments = tree.map_structure(
            ops.convert_to_tensor, (generation, bounds, values)
        )
        generation, bounds, values = arguments
        if not self._unfinished(generation, bounds):
            return generation

        def make(weights):
            bind = functools.partial(self._bind_decode, weights, structure)
            # A step too many would change a state, and takes a CPU time.
            ahead = self.records and not self.lm.backbone.has_states
            return StepsInPlace(bind, *arguments, ahead=ahead)

        shapes = tuple(x.shape for x in pytree.tree_leaves(arguments))
        key = "decode", structure, shapes
        steps = self._bound_to(generation.cache, key, generation.index, make)
        return steps.run(*arguments, most)

    def _bind_decode(self, weights, structure, *arguments):
        """A decode step that changes its arguments, see `StepsInPlace`."""

        def step(weights, generation, bounds, values):
            def call(generation):
                tokens = tokens_from(generation.token_ids, generation.index)
                logits = self._logits(
                    weights,
                    tokens,
                    generation.cache,
                    self._index(generation, 1),
                    self._further_inputs(tokens),
                )
                return logits, generation.cache

            ended, now = generation.ended(bounds.limit), generation
            if len(ended) == 1:
                # A row that is alone goes on in any case, be there room or not.
                last = generation.token_ids.shape[1] - 2
                now = now._replace(index=now.index.clamp(max=last))
            pick = self._picker(values, structure)
            with accessing(self.access):
                after = decode_step(pick, call, now, bounds)
            for old, new in zip(changing(generation), changing(after)):
                kept = ended.view(-1, *[1] * (new.ndim - 1))
                old.copy_(torch.where(kept, old, new))
            return self._unfinished(after, bounds)

        prepare, module = self._capture(
            ("decode", structure), step, weights, *arguments
        )
        return self._ready(prepare, module, weights, arguments)

    def _verify(self, *args):
        with self._threads():
            return super()._verify(*args)

    def _threads(self):
        """A scope in which kernels of our own have the cores to themselves."""
        return (
            contextlib.nullcontext()
            if self.own_products is None
            else one_thread()
        )

    def _make_call(self, length=1):
        def call(generation):
            cache = generation.cache
            index = self._index(generation, length)
            now = tokens_from(generation.token_ids, generation.index, length)
            further = self._further_inputs(now)
            logits = self._call(self._logits, now, index, cache, further)
            return logits, cache

        return call

    def _call(self, function, tokens, index, cache, further):
        """Calls what is bound to this cache and to these weights.

        Args:
            function: `_logits()` or `_read_chunk()`.
            tokens: What it takes after the weights, as all that follow. int32
                `(B, T)`.
            index: int32, `()` or `(B,)`.
            cache: A cache.
            further: Dictionary of tensors.
        """

        def bind(weights):
            return self._bind(function, weights, tokens, index, cache, further)

        key = function.__name__, tuple(tokens.shape), index.ndim
        return self._bound_to(cache, key, tokens, bind)(tokens, index, further)

    def _bound_to(self, cache, key, tokens, make):
        """Steps on a cache and on the weights, the last ones if they are.

        Args:
            cache: A cache.
            key: What steps they are.
            tokens: Tensor with a number for each token that they read.
            make: Function that makes them, from `_weights()`.
        """
        weights = self._weights(tokens.numel())
        values, packed = weights
        key = key, threading.get_ident()
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
            return before.steps
        steps = make(weights)
        self._bound[key] = _Bound(steps, cache, of_cache, bound_to, choices)
        return steps

    def _weights(self, rows):
        """The values of all variables, and what is packed for some rows."""
        return self._read(), packed_now(self.own_products, rows)

    def _bind(self, function, weights, tokens, index, cache, further):
        """What `_call()` calls, on some weights and a cache."""
        token = torch.zeros_like(tokens)
        slot = torch.zeros_like(index)
        inputs = pytree.tree_map(torch.clone, further)
        arguments = token, cache, slot, inputs
        prepare, module = self._capture(
            (function.__name__,), function, weights, *arguments
        )
        step = self._ready(prepare, module, weights, arguments)

        def bound_step(new_token, index, further):
            token.copy_(new_token)
            slot.copy_(index)
            for name, x in further.items():
                inputs[name].copy_(x)
            return step()

        return bound_step

    def _ready(self, prepare, module, weights, arguments):
        """What was captured, on some weights and arguments.

        Returns:
            A function without arguments, recorded when it is first called: not
            before, as it writes into the cache.
        """
        leaves = [
            *prepare(*pytree.tree_leaves(weights)),
            *pytree.tree_leaves(arguments),
        ]
        device = leaves[-1].device.type
        step, threads = None, contextlib.nullcontext
        if multiplies(module):
            threads = all_threads

        def run():
            nonlocal step
            # What autocasting does was captured.
            with torch.autocast(device, enabled=False), threads():
                if step is None:
                    step, output = self._recorded(module, leaves)
                    return output
                return step()

        return run

    def _recorded(self, module, arguments):
        """Runs a step that reads and writes the same memory each time.

        Returns:
            A tuple of what runs it again, and what it returned.
        """
        step = functools.partial(module, *arguments)
        if self.records:
            return record(step)
        if self.own_products is not None and not self.lm.jit_compile:
            # Which takes numba to import.
            from keras_nlp_cache.generate.loops import torch_replay

            return torch_replay.record(module, arguments)
        return step, step()

    def _capture(self, key, function, weights, *arguments):
        """Captures what the model does, or finds it.

        Args:
            key: Tuple, what is captured, besides what its arguments say.
            function: Function of `weights` and `arguments`.
            weights: From `_weights()`.
            *arguments: What else it takes, tensors in any nesting.

        Returns:
            A tuple `(prepare, step)`, see `separate_views()`.
        """
        leaves = pytree.tree_leaves(arguments)
        shapes = [tuple(x.shape) for x in leaves]
        key = *key, *shapes, operator_choices(leaves[0].device)

        def traced_once(*args):
            with tracing_once():
                return function(*args)

        with self._capturing, collecting_none():
            if key not in self._captured:
                module = capture(traced_once, weights, *arguments)
                fixed = len(pytree.tree_leaves(weights))
                prepare, step = separate_views(module, fixed)
                self._captured[key] = prepare, self._improved(step)
            return self._captured[key]

    def _improved(self, step):
        """What was captured, in fewer operators."""
        if self.lm.jit_compile:
            return torch.compile(step, dynamic=False)
        if self.own_products is not None:
            # Which takes numba to import.
            from keras_nlp_cache.generate.loops import torch_step_kernels

            fuse(step, torch_step_kernels.kernel_of)
        elif self.records and _has_triton():
            from keras_nlp_cache.generate.loops import triton_step_kernels

            fuse(step, triton_step_kernels.kernel_of)
        return step

    def _logits(self, weights, token_ids, cache, index, further):
        with self._multiplying(weights):
            logits, _, _ = self.lm.call_with_cache(
                token_ids, cache, index, **further
            )
            return logits

    def _read_chunk(self, weights, token_ids, cache, index, further):
        with self._multiplying(weights), accessing(self.access):
            self.lm.read(token_ids, cache, index, **further)
            return index

    @contextlib.contextmanager
    def _multiplying(self, weights):
        """A scope in which the model has the weights that are passed to it."""
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
            yield
