"""Decode steps of PyTorch without Keras, the token that is picked included.

Python takes longer to ask for a step than a GPU takes to make it, and to look
whether a text has ended is to wait for all that was asked for. So all of a step
is captured, in memory where each finds what the one before it left, and on a
GPU it is one launch. While a step runs there, the host asks for the next, and
learns whether there was to be one.
"""

import torch
from torch.utils import _pytree as pytree


def record(function):
    """Calls a function, and records what it does on a GPU.

    Args:
        function: Takes no arguments. Reads and writes the same memory whenever
            it is called.

    Returns:
        A tuple of a function that does the same again, launched at once, and
        what the call returned. The function returns the same tensors whenever
        it is called.

    Reference:
        https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    # Libraries set themselves up in the first call, which can't be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay():
        graph.replay()
        return output

    return replay, first


def look(flag):
    """Asks a GPU for a value, without waiting for it.

    Args:
        flag: bool scalar tensor.

    Returns:
        A function without arguments that waits for the value that the tensor
        has after all that was asked for up to now, and returns it.
    """
    if not flag.is_cuda:
        value = bool(flag)
        return lambda: value
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def wait():
        there.synchronize()
        return bool(host)

    return wait


class StepsInPlace:
    """Decode steps on one cache, each of which finds what the last one left.

    Args:
        bind: Function from a `Generation`, `Bounds` and a dictionary of values,
            all of them tensors, to a function without arguments that makes a
            step on these. It writes to what is `changing()`, but for rows that
            have ended, and returns a bool scalar, whether there is to be
            another step.
        generation: A `Generation` of tensors.
        bounds: `Bounds` of tensors.
        values: Dictionary of tensors, from `Options.values()`.
        ahead: bool. Whether to ask for a step before it is known that there is
            to be one.
    """

    def __init__(self, bind, generation, bounds, values, ahead):
        # The tensors of a cache are written to where they are.
        own = generation._replace(cache=())
        self._own = pytree.tree_map(torch.clone, (own, bounds, values))
        own, *rest = self._own
        self._generation = own._replace(cache=generation.cache)
        self._step = bind(self._generation, *rest)
        self._ahead = ahead

    def run(self, generation, bounds, values, most):
        """Makes steps until there are enough.

        Args:
            generation: A `Generation` of tensors that is to go on, and is not
                to be used any more.
            bounds: `Bounds` of tensors.
            values: Dictionary of tensors.
            most: int. How many steps to make at most.

        Returns:
            The `Generation` that was reached.
        """
        without_cache = generation._replace(cache=())
        given = pytree.tree_leaves((without_cache, bounds, values))
        for own, x in zip(pytree.tree_leaves(self._own), given):
            if own is not x:
                own.copy_(x)
        goes_on = None
        for _ in range(most):
            flag = self._step()
            if self._ahead:
                before, goes_on = goes_on, look(flag)
                if before is not None and not before():
                    break
            elif not flag:
                break
        return self._generation._replace(cache=generation.cache)


def changing(generation):
    """The tensors of a `Generation` that steps change, but for its cache."""
    return [
        generation.token_ids,
        generation.index,
        generation.done,
        *generation.logprobs,
    ]
