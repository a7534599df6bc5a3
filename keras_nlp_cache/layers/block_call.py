"""The call of a decoder block that is under way, for the layers inside it.

Upstream's blocks are code, not graphs. A layer inside one sees what it is
called with and no more, and what it returns goes where the code sends it. A
layer that remembers needs more than that, its entry in the cache, and so do
edits of the residual stream and taps inside of a block.

This is the one thing that the layers of this package tell each other behind
the back of upstream's code. It is set where a block is called and holds until
that call returns, in each thread and in each trace for itself.
"""

import contextlib
import contextvars

import keras

_current = contextvars.ContextVar("keras_nlp_cache_block_call", default=None)
_collected = contextvars.ContextVar("keras_nlp_cache_taps", default=None)
_carried = contextvars.ContextVar("keras_nlp_cache_carried", default=None)


def first_argument(args, kwargs):
    """The sequence, all that upstream's layers agree to take first.

    They name it `query`, `hidden_states`, `decoder_sequence` or `x`, and some
    are called by keyword.
    """
    return args[0] if args else next(iter(kwargs.values()))


def sequence_first(block, args, kwargs):
    """The same arguments of a decoder block, with its sequence by place.

    A keyword may stand behind others.
    """
    if args:
        return args, kwargs
    kwargs = dict(kwargs)
    return (kwargs.pop(block.call_signature_parameters[0]),), kwargs


class BlockCall:
    """One call of a decoder block.

    Attributes:
        hidden_states: Tensor `(B, T, hidden_dim)`, what the block was called
            with, and the residual stream up to its first sum.
        branch_inputs: Dictionary from `"attention"` or `"feedforward"` to the
            tensor that this branch of the block starts from, if a layer inside
            asked for it.
        taps: Dictionary from the names of parts to tensors.
        entries: Dictionary from the `id()` of layers to the `LayerCache` that
            is theirs in this call. Empty where upstream's code attends.
        across: The same of second entries, for what an encoder returned.
        updated: Dictionary from the `id()` of layers to what became of it.
        updated_across: The same of second entries.
        chosen: What tokens chose while experts are called of which not all are
            needed, and else `None`.
    """

    def __init__(self, hidden_states, entries, across):
        self.hidden_states = hidden_states
        self.branch_inputs = {}
        self.taps = {}
        self.entries, self.across = entries, across
        self.updated, self.updated_across = {}, {}
        self.chosen = None

    @property
    def is_cached(self):
        """Whether there are tokens of earlier calls, or there will be."""
        return any(
            x.key is not None or x.index is not None
            for x in self.entries.values()
        )


@contextlib.contextmanager
def calling(hidden_states, entries, across=None):
    """In this scope, a block is called on some hidden states.

    Args:
        hidden_states: Tensor `(B, T, hidden_dim)`.
        entries: Dictionary from the `id()` of layers to `LayerCache`s.
        across: Optional dictionary like it, of those that have a second one.
    """
    call = BlockCall(hidden_states, entries, across or {})
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def current():
    """The `BlockCall` that is under way, `None` outside of a block."""
    return _current.get()


def entry_of(layer):
    """The `LayerCache` of a layer in the call under way, `None` without one."""
    call = _current.get()
    return None if call is None else call.entries.get(id(layer))


def across_of(layer):
    """The same of the second entry of a layer that has two."""
    call = _current.get()
    return None if call is None else call.across.get(id(layer))


@contextlib.contextmanager
def collecting_taps():
    """Yields a dictionary that gets the taps of each block that is called."""
    taps = {}
    token = _collected.set(taps)
    try:
        yield taps
    finally:
        _collected.reset(token)
    collect(taps)


def collect(taps):
    """Hands taps of a block to whoever collects them."""
    if _collected.get() is not None:
        _collected.get().update(taps)


@contextlib.contextmanager
def collecting_carried():
    """Yields a list that gets what `carry()` was called with last."""
    carried = []
    token = _carried.set(carried)
    try:
        yield carried
    finally:
        _carried.reset(token)


def carry(further):
    """Hands what a block returns beside hidden states to who replays a graph.

    Args:
        further: List of tensors. The blocks that follow take them.
    """
    if _carried.get() is not None:
        _carried.get()[:] = further


class InBlock(keras.layers.Layer):
    """Base of layers that take part in the call of the block around them.

    They cannot be computed again on their own: what is computed again has no
    block around it.
    """

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call


class BlockTap(InBlock):
    """Base of layers whose result a block returns beside its hidden states.

    Attributes:
        part: str. The name under which the block returns it.
    """

    def put(self, x):
        """Says what to return, if there is a block to return it."""
        if current() is not None:
            current().taps[self.part] = x

    def tap_spec(self, hidden_states, slots):
        """What `put()` will be called with, as a `KerasTensor`.

        Args:
            hidden_states: `KerasTensor` `(B, T, hidden_dim)`, what the block
                is called with.
            slots: int or `None`. How many slots are attended.
        """
        raise NotImplementedError


def takes_part(layer):
    """Whether a layer holds one that takes part in the call of its block."""
    return any(isinstance(x, InBlock) for x in layer._flatten_layers())
