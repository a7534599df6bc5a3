"""Generation on PyTorch: an eager prefill, a captured decode step."""

import keras
import torch
from torch.utils import _pytree as pytree

from keras_nlp_cache.loops.generation import Loop
from keras_nlp_cache.loops.torch_capture import capture
from keras_nlp_cache.loops.torch_capture import separate_views
from keras_nlp_cache.loops.torch_products import DenseProducts


class TorchLoop(Loop):
    """Generation that calls the layers of the model once, not once per token.

    The prefill runs eagerly, for prompts of any length. The model's part of a
    decode step is captured for each size of the cache. Weights are arguments of
    what is captured, so that new ones are seen.

    With `jit_compile=True`, what was captured is compiled by Inductor, which on
    two cores takes minutes.
    """

    def __init__(self, lm):
        super().__init__(lm)
        self._captured = {}

    @property
    def compilations(self):
        return len(self._captured)

    def _prefill(self, token_ids, given, length):
        with torch.no_grad(), DenseProducts():
            return super()._prefill(token_ids, given, length)

    def _decode(self, generation, limit, stop_token_ids):
        with torch.no_grad():
            return super()._decode(generation, limit, stop_token_ids)

    def _make_call(self):
        weights = [x.value for x in self.variables]
        views = None

        def call(generation):
            nonlocal views
            token_ids, _, _, index, cache = generation
            args = (
                token_ids[:, index : index + 1],
                cache,
                torch.tensor(index, dtype=torch.int32, device=token_ids.device),
            )
            prepare, step = self._captured_step(weights, *args)
            if views is None:
                views = prepare(*weights)
            return step(*views, *pytree.tree_leaves(args)), cache

        return call

    def _captured_step(self, weights, token_ids, cache, index):
        key = token_ids.shape[0], cache[0][0].shape[2]
        if key not in self._captured:
            module = capture(self._step, weights, token_ids, cache, index)
            prepare, step = separate_views(module, len(weights))
            if self.lm.jit_compile:
                step = torch.compile(step)
            self._captured[key] = prepare, step
        return self._captured[key]

    def _step(self, weights, token_ids, cache, index):
        mapping = list(zip(self.variables, weights))
        with keras.StatelessScope(state_mapping=mapping), DenseProducts():
            return self.lm.call_with_cache(token_ids, cache, index)[0][:, 0]
