"""Decoder blocks whose layers find their entries in the cache by themselves.

A block is called exactly as upstream calls it, and runs upstream's code. It
tells the layers inside that remember where their entries are, and returns what
became of them beside what upstream's code returns. So one class serves every
family, and few families need code for their blocks.

A decoder that reads what an encoder returned has a second attention layer in
each block, which attends across. Its entry is written by a call that is given
something to read, and is only read by those that follow.
"""

import functools
import inspect

import keras
from keras import tree

from keras_nlp_cache.attention.layer import CachedAttention
from keras_nlp_cache.attention.recurrent import Recurrent
from keras_nlp_cache.blocks.block_parts import find_parts
from keras_nlp_cache.blocks.encoder_block import hidden_states_alone
from keras_nlp_cache.blocks.replaying import active_wiring
from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.shared_keys import SharedKeys
from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.drop_in import stand_in
from keras_nlp_cache.layers import block_call
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.block_call import sequence_first
from keras_nlp_cache.layers.remembering import Remembers
from keras_nlp_cache.layers.sharing import attributes
from keras_nlp_cache.layers.specializing import specialize_within
from keras_nlp_cache.layers.specializing import Specialized
from keras_nlp_cache.layers.whole_config import with_arguments


class DecoderBlock(Specialized):
    """Mixin that gives an upstream decoder block entries in a cache.

    `decoder_block()` makes the class for a block of upstream's.

    A block has two branches, attention and feed-forward network. Each starts
    from normalized hidden states and is added to the hidden states. The layers
    that a branch is made of are its *parts*, which surgery can edit. A block
    with tapped parts returns a dictionary of these last.

    Call arguments:
        *args: As upstream's block.
        entries: Optional tuple with one `LayerCache` for each entry of
            `remembering()`.
        **kwargs: As upstream's block.

    Returns:
        What upstream's block does. With `entries`, a pair of that and a tuple
        of `(key, value)` pairs, updated. Layers that borrow have none.

    Attributes:
        padding_argument: Name of the `call()` argument that takes the padding
            mask, `None` if there is none.
        source_argument: Name of the one that takes what an encoder returned,
            `None` if there is none.
        source_mask_argument: Name of the one that takes which of that is
            padding, `(B, S)` or `(B, 1, S)`. `None` if it is what the graph is
            given.
        packs_source: bool. Whether upstream's block takes that together with
            the hidden states, as a pair. Here it is an argument of its own.
        carries: Names of arguments that take what the block before, or an
            earlier one, returned beside hidden states, in the order in which it
            does.
        shared_argument: Name of the one of these that takes what a layer inside
            that borrows is to read. `None` if none does.
        streams: How many streams of hidden states the block takes and returns,
            `(streams, B, T, hidden_dim)`. `None` for `(B, T, hidden_dim)`.
        own_parts: Method that returns a dictionary like `parts`, with what
            this family calls otherwise than others.
    """

    own_arguments = ("entries",)
    padding_argument = None
    source_argument = None
    source_mask_argument = None
    packs_source = False
    carries = ()
    shared_argument = None
    streams = None

    def own_parts(self):
        return {}

    def stream_shape(self, shape):
        """The shape of what branches start from, `(B, T, hidden_dim)`.

        Args:
            shape: That of the hidden states that the block takes.
        """
        return tuple(shape if self.streams is None else shape[1:])

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        upstream = cls.__bases__[-1]
        masks = [
            name
            for name in inspect.signature(upstream.call).parameters
            if name.endswith("padding_mask") and "encoder" not in name
        ]
        if masks:
            cls.padding_argument = masks[0]
        for name in SOURCES:
            if name in inspect.signature(cls.call).parameters:
                cls.source_argument = name

        given = vars(cls).get("build", upstream.build)

        @functools.wraps(given)
        def build(self, *args, **kwargs):
            given(self, *args, **kwargs)
            self.on_specialized()

        cls.build = build

    def __init__(self, *args, **kwargs):
        super().__init__(*args, autocast=False, **kwargs)
        # For its config, should upstream's code have kept something nowhere.
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name != "kwargs" and not hasattr(self, name):
                setattr(self, name, value)

    def on_specialized(self):
        # The constructor of this class did not run.
        self.autocast = False
        specialize_within(self._layers)
        weight_paths.count_within(self)

    # === What is inside ===

    # No property: Keras lays files out by attributes that are layers.
    def remembering(self):
        """The layers inside that remember, in an order that stays.

        One that has two entries comes twice, the entry of the text first.
        """
        return [
            layer
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, Remembers) and layer.remembers
            for _ in range(1 + layer.joins_source)
        ]

    @property
    def entry_count(self):
        """How many entries of a cache are its own."""
        return sum(not layer.borrows for layer in self.remembering())

    @property
    def has_state(self):
        """Whether what remembers keeps a state, and attends to no tokens."""
        return any(x.state_shapes is not None for x in self.remembering())

    # No property, either.
    def attention_across(self):
        """The layer that attends to what an encoder returned, or `None`."""
        for name in _ATTENTION_ACROSS:
            if getattr(self, name, None) is not None:
                return getattr(self, name)
        return None

    @property
    def attention_name(self):
        """Name of the attribute that holds the attention layer.

        Or what stands in its place, with a state. `None` if there is neither.
        """
        return next(
            (
                name
                for name, layer in attributes(self).items()
                if isinstance(layer, CachedAttention)
                or (isinstance(layer, Recurrent) and layer.projections)
            ),
            None,
        )

    @property
    def parts(self):
        """Dictionary from the names of parts to the attributes they are.

        `"attention.norm"`, `"feedforward.norm"`, `"feedforward.up"`,
        `"feedforward.down"`, and where there are such `"feedforward.gate"`,
        `"attention.post_norm"` and `"feedforward.post_norm"`. `"attention"` and
        `"feedforward"` are the last layers of the branches, those whose results
        are added. A dot in an attribute leads into a layer.
        """
        return find_parts(self) | self.own_parts()

    @property
    def part_paths(self):
        """Dictionary from the names of parts to paths of attributes.

        A path leads through the block to the layer: `("attention",
        "query_dense")`.
        """
        name = self.attention_name
        if name is None:
            return {}
        projections = getattr(self, name).projections
        paths = {
            f"attention.{part}": (name, attribute)
            for part, attribute in projections.items()
        }
        paths |= {
            part: tuple(attribute.split("."))
            for part, attribute in self.parts.items()
        }
        return dict(sorted(paths.items()))

    def _compute_self_attention_mask(self, *args, **kwargs):
        if self._remembers_now():
            return None
        return super()._compute_self_attention_mask(*args, **kwargs)

    def _compute_attention_mask(self, *args, **kwargs):
        if self._remembers_now():
            return None
        return super()._compute_attention_mask(*args, **kwargs)

    def _remembers_now(self):
        """Whether our attention is called, which has a mask of its own."""
        call = block_call.current()
        return call is not None and bool(call.entries)

    # === Calling it ===

    def arranged(self, args, kwargs):
        """The same arguments, with the hidden states alone by place."""
        args, kwargs = sequence_first(self, args, kwargs)
        if self.packs_source and isinstance(args[0], (tuple, list)):
            (x, source), *args = args
            args, kwargs = (x, *args), {**kwargs, self.source_argument: source}
        return args, kwargs

    def build_on(self, x, source=None):
        """Builds the block for what it is going to be called on.

        Args:
            x: Tensor `(B, T, hidden_dim)`.
            source: Optional tensor, what an encoder returned.
        """
        if self.packs_source:
            self.build((x.shape, source.shape))
        elif source is not None and _takes_several(self.build):
            self.build(x.shape, source.shape)
        else:
            self.build(x.shape)

    def __call__(self, *args, **kwargs):
        args, kwargs = self.arranged(args, kwargs)
        wiring = active_wiring()
        if wiring is not None and kwargs.get("entries") is None:
            if isinstance(first_argument(args, kwargs), keras.KerasTensor):
                kwargs.pop("entries", None)
                self._check_fits(first_argument(args, kwargs))
                return hidden_states_alone(
                    wiring.call_block(self, args, kwargs)
                )
        # Keras casts all float arguments to the compute dtype. Hidden states
        # should be, a cache should not: it may have been made in another
        # dtype on request, and casting it would copy it at every step.
        cached = {
            name: x
            for name, x in kwargs.items()
            if name == "entries" or isinstance(x, SharedKeys)
        }
        args, kwargs = tree.map_structure(
            lambda x: self.dtype_policy.convert_input(
                x, True, self.input_dtype
            ),
            (args, {k: x for k, x in kwargs.items() if k not in cached}),
        )
        if cached.get("entries", ()) is None:
            del cached["entries"]
        kwargs |= cached
        outputs = access().call_block(self, _call, args, kwargs)
        if isinstance(first_argument(args, kwargs), keras.KerasTensor):
            if self.tapped_parts:
                block_call.collect(outputs[-1])
        return outputs

    def call(self, *args, entries=None, **kwargs):
        hidden_states = first_argument(args, kwargs)
        layers = [] if entries is None else self.remembering()
        found, second = {}, {}
        for layer, entry in zip(layers, entries or (), strict=True):
            if entry.in_use:
                (second if id(layer) in found else found)[id(layer)] = entry
        if found and self.padding_argument is not None:
            # It speaks of slots, and our mask has it.
            kwargs.pop(self.padding_argument, None)
        if self.source_argument is not None:
            args, kwargs = self._with_source(
                hidden_states, args, kwargs, found, second
            )
        with block_call.calling(hidden_states, found, second) as call:
            outputs = super().call(*args, **kwargs)
        if entries is not None:
            outputs = self._in_graph(outputs)
            pairs, seen = [], set()
            for layer, entry in zip(layers, entries):
                if layer.borrows:
                    continue
                updated = call.updated_across if layer in seen else call.updated
                seen.add(layer)
                pairs.append(updated.get(id(layer), (entry.key, entry.value)))
            outputs = outputs, tuple(pairs)
        if not call.taps:
            return outputs
        block_call.collect(call.taps)
        return *(outputs if entries is not None else (outputs,)), call.taps

    def _with_source(self, hidden_states, args, kwargs, found, second):
        """Tells the layer that attends across what there is to read.

        Returns:
            `(args, kwargs)` for upstream's code, which takes for granted that
            there is something.
        """
        kwargs = dict(kwargs)
        source = kwargs.pop(self.source_argument, None)
        across = id(self.attention_across())
        entries = second if across in second else found
        if across in entries:
            entries[across] = entries[across]._replace(source=source)
            for name in _SOURCE_MASKS:
                kwargs.pop(name, None)
            if source is None:
                source = hidden_states  # Nobody looks at it.
        if self.packs_source:
            return ((hidden_states, source), *args[1:]), kwargs
        if source is not None:
            kwargs[self.source_argument] = source
        return args, kwargs

    def _in_graph(self, outputs):
        """Of what upstream's code returns, what a graph goes on with."""
        if not isinstance(outputs, tuple):
            return outputs
        x, *further = outputs
        further = further[: len(self.carries)]
        return (x, *further) if further else x

    def compute_output_spec(self, *args, entries=None, **kwargs):
        """What the block returns, for all families and with all it may take."""
        hidden_states = first_argument(args, kwargs)
        hidden_states = keras.KerasTensor(
            self.stream_shape(hidden_states.shape), hidden_states.dtype
        )
        outputs, slots = self.upstream_spec(*args, **kwargs), None
        if entries is None:
            outputs, slots = (outputs,), hidden_states.shape[1]
        else:
            pairs = tuple(
                (entry.key, entry.value)
                for layer, entry in zip(self.remembering(), entries)
                if not layer.borrows
            )
            joins = any(x.joins_source for x in self.remembering())
            if pairs and pairs[0][0] is not None:
                if not (joins or self.has_state):
                    slots = pairs[0][0].shape[2]
            outputs = (
                self._in_graph(outputs),
                tree.map_structure(_spec, pairs),
            )
        taps = {
            tap.part: tap.tap_spec(hidden_states, slots) for tap in self._taps()
        }
        if taps:
            return *outputs, taps
        return outputs if entries is not None else outputs[0]

    def upstream_spec(self, *args, **kwargs):
        """What upstream's block returns: hidden states like those it takes."""
        return keras.KerasTensor(
            first_argument(args, kwargs).shape, dtype=self.compute_dtype
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """The call, to be computed again for a gradient.

        What is computed again takes and returns nothing but tensors: JAX would
        trace `training`, and TensorFlow cannot return what stands for no cache.
        """
        if block_call.takes_part(self):
            return layer_call
        fixed = {k: v for k, v in kwargs.items() if isinstance(v, bool)}
        entries = kwargs.get("entries")
        is_empty = entries is not None and entries[0].key is None

        def on_tensors(*args, **kwargs):
            outputs = layer_call(*args, **kwargs, **fixed)
            return outputs[0] if is_empty else outputs

        call = super().rematerialized_call(on_tensors, *args, **kwargs)

        def rematerialized(*args, **kwargs):
            kwargs = {k: v for k, v in kwargs.items() if k not in fixed}
            outputs = call(*args, **kwargs)
            if not is_empty:
                return outputs
            return outputs, ((None, None),) * self.entry_count

        return rematerialized

    @property
    def tapped_parts(self):
        """Names of the parts whose results are returned, too, in order."""
        return sorted({tap.part for tap in self._taps()})

    def _taps(self):
        return [
            layer
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, block_call.BlockTap)
        ]

    def _check_fits(self, x):
        """Raises a `ValueError` if the block was built for another size."""
        shapes = self.get_build_config() or {}
        shapes = shapes.get("shapes_dict", shapes)
        for name, shape in shapes.items():
            if name.startswith("encoder"):
                continue
            while shape and isinstance(shape[0], (tuple, list)):
                shape = shape[0]  # Of a pair that it takes.
            if shape is not None and shape[-1] != x.shape[-1]:
                raise ValueError(
                    f"Expected decoder block {self.name!r}, which was built "
                    f"for hidden states of size {shape[-1]}, to get such. "
                    f"Received: shape={tuple(x.shape)}. Only blocks of the "
                    "same hidden size go into one model."
                )
        axes = 3 if self.streams is None else 4
        if len(x.shape) != axes or self.streams not in (None, x.shape[0]):
            expected = "(B, T, hidden_dim)"
            if self.streams is not None:
                expected = f"({self.streams}, B, T, hidden_dim)"
            raise ValueError(
                f"Expected decoder block {self.name!r} to get hidden states "
                f"{expected}. Received: shape={tuple(x.shape)}. Only blocks "
                "with as many streams of them go into one model."
            )

    def get_config(self):
        upstream = type(self).__bases__[-1]
        try:
            config = super().get_config()
        except AttributeError:
            config = keras.layers.Layer.get_config(self)
        return with_arguments(config, self, upstream)


def _call(block, args, kwargs):
    return super(DecoderBlock, block).__call__(*args, **kwargs)


# What upstream's blocks call what they have because of an encoder.
SOURCES = ("encoder_sequence", "encoder_hidden_states", "source")
_SOURCE_MASKS = (
    "encoder_padding_mask",
    "encoder_attention_mask",
    "cross_attention_padding_mask",
)
_ATTENTION_ACROSS = (
    "_cross_attention_layer",
    "cross_attention",
    "cross_attn",
    "merged_attn",
)


def _takes_several(build):
    return len(inspect.signature(build).parameters) > 1


def _spec(x):
    return None if x is None else keras.KerasTensor(x.shape, x.dtype)


def decoder_block(upstream, own_parts=None):
    """The class to give the decoder blocks of an upstream class.

    Args:
        upstream: A class of decoder blocks.
        own_parts: Optional function from a block to a dictionary like that of
            `DecoderBlock.parts`, with what other families call otherwise.

    Returns:
        A subclass of `DecoderBlock` and of `upstream`.
    """
    found = stand_in(upstream)
    if found is not None:
        return found
    cls = type(
        upstream.__name__,
        (DecoderBlock, upstream),
        {
            "__doc__": f"A `{upstream.__name__}` whose attention remembers.",
            "own_parts": own_parts or DecoderBlock.own_parts,
        },
    )
    return replaces(upstream)(cls)
