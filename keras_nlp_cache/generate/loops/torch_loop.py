"""Generation on PyTorch: an eager prefill, a captured decode step."""

import contextlib
import functools
import threading

import keras
import torch
from torch.utils import _pytree as pytree

from keras_nlp_cache.generate.loops.generation import Loop
from keras_nlp_cache.generate.loops.torch_capture import capture
from keras_nlp_cache.generate.loops.torch_capture import separate_views
from keras_nlp_cache.generate.loops.torch_products import dense_product
from keras_nlp_cache.generate.loops.torch_products import DenseProducts
from keras_nlp_cache.generate.loops.torch_products import opaque_dense_product


def record(function):
    """Records what a function does on a GPU, to launch it all at once.

    Args:
        function: Takes no arguments. Reads and writes the same memory whenever
            it is called, and may be called twice in place of once.

    Returns:
        A function that does the same again, and returns the same tensor.

    Reference:
        https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    # Libraries set themselves up in the first call, which can't be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
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


class EagerTorchLoop(Loop):
    """Generation that calls the layers of the model once per token."""

    def _prefill(self, *args):
        with inference():
            return super()._prefill(*args)

    def _prefill_more(self, *args):
        with inference():
            return super()._prefill_more(*args)

    def _step(self, *args):
        with inference():
            return super()._step(*args)

    def _verify(self, *args):
        with inference():
            return super()._verify(*args)

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
        self._captured = {}
        self._capturing = threading.Lock()

    @property
    def compilations(self):
        return len(self._captured)

    def _prefill_more(self, *args):
        with DenseProducts():
            return super()._prefill_more(*args)

    def _make_call(self, length=None):
        step = bound_for = None

        def call(generation):
            nonlocal step, bound_for
            token_ids, _, _, index, cache = generation
            choices = operator_choices(token_ids.device)
            now = token_ids[:, index : index + (length or 1)]
            further = self._further_inputs(generation, tuple(now.shape))
            if choices != bound_for:
                step = self._bind(now, cache, further)
                bound_for = choices
            logits = step(now, index, further)
            return logits if length else logits[:, 0], cache

        return call

    def _bind(self, tokens, cache, further):
        """A step from tokens to logits, on the weights and cache of now."""
        weights = [x.value for x in self.variables]
        token = torch.zeros_like(tokens)
        slot = token.new_zeros((), dtype=torch.int32)
        inputs = pytree.tree_map(torch.clone, further)
        arguments = token, cache, slot, inputs
        prepare, step = self._captured_step(weights, *arguments)
        step = functools.partial(
            step, *prepare(*weights), *pytree.tree_leaves(arguments)
        )
        on_gpu = self.is_gpu(token.device)

        def bound_step(new_token, index, further):
            nonlocal step, on_gpu
            token.copy_(new_token)
            slot.fill_(index)
            for name, x in further.items():
                inputs[name].copy_(x)
            # What autocasting does was captured.
            with torch.autocast(token.device.type, enabled=False):
                if on_gpu:
                    # Not before: it runs the step, which writes into the cache.
                    step, on_gpu = record(step), False
                return step()

        return bound_step

    def _captured_step(self, weights, token_ids, cache, index, further):
        choices = operator_choices(token_ids.device)
        key = *token_ids.shape, cache[0][0].shape[2], choices
        with self._capturing:
            if key not in self._captured:
                module = capture(
                    self._logits, weights, token_ids, cache, index, further
                )
                prepare, step = separate_views(module, len(weights))
                if self.lm.jit_compile:
                    step = torch.compile(step, dynamic=False)
                self._captured[key] = prepare, step
            return self._captured[key]

    def _logits(self, weights, token_ids, cache, index, further):
        mapping = list(zip(self.variables, weights))
        products = DenseProducts(
            opaque_dense_product if self.lm.jit_compile else dense_product
        )
        with keras.StatelessScope(state_mapping=mapping), products:
            logits, _, _ = self.lm.call_with_cache(
                token_ids, cache, index, **further
            )
            return logits
