"""Decoder blocks that take a cache and return it.

Upstream's blocks already thread a cache through their `call`: whatever comes
in as the cache goes to the attention layer, and what the attention layer gives
back comes out beside the hidden states. So a block needs no `call` of its own
here. It passes a `LayerCache` on to an attention layer that knows what that
is, and states the outputs that follow from it.
"""

import keras

from keras_nlp_cache import block_call
from keras_nlp_cache.attention import Rematerializable
from keras_nlp_cache.cache import LayerCache
from keras_nlp_cache.cached_block import CachedBlock
from keras_nlp_cache.cached_block import first_argument
from keras_nlp_cache.replaying import active_wiring


class DecoderBlock(CachedBlock, Rematerializable):
    """Mixin that gives an upstream decoder block a per-layer cache.

    Placed before the upstream class in the bases of a layer of the same name.
    Subclasses set `attention_cls`, and call `specialize_attention()` at the
    end of their `build()`.

    A block has two branches, attention and feed-forward network. Each starts
    from normalized hidden states and is added to the hidden states. The layers
    that a branch is made of are its *parts*, which surgery can edit. A block
    with tapped parts returns a dictionary of these last.

    Attributes, beside those of `CachedBlock`:
        attention_cls: Class to give the attention layer, a `CachedAttention`.
        parts: Dictionary from the names of parts to the attributes that hold
            them: `"attention.norm"`, `"feedforward.norm"`, `"feedforward.up"`,
            `"feedforward.down"`, and where there are such `"feedforward.gate"`,
            `"attention.post_norm"` and `"feedforward.post_norm"`.
            `"attention"` and `"feedforward"` are the last layers of the
            branches, those whose results are added. An attribute with a dot
            is one of the attention layer.
    """

    attention_cls = None
    parts = {}

    def specialize_attention(self):
        attention = getattr(self, self.attention_name)
        specialize(attention, self.attention_cls)
        attention.autocast = False

    def __call__(self, *args, **kwargs):
        wiring = active_wiring()
        if wiring is not None and kwargs.get(self.cache_argument) is None:
            if isinstance(first_argument(args, kwargs), keras.KerasTensor):
                kwargs.pop(self.cache_argument, None)
                self._check_fits(first_argument(args, kwargs))
                return wiring.call_block(self, args, kwargs)
        hidden_states = first_argument(args, kwargs)
        with block_call.calling(hidden_states) as call:
            outputs = super().__call__(*args, **kwargs)
        taps = call.taps
        if isinstance(hidden_states, keras.KerasTensor) and self.tapped_parts:
            *outputs, taps = outputs
        if not taps:
            return outputs
        block_call.collect(taps)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return *outputs, taps

    def compute_output_spec(self, *args, **kwargs):
        outputs = super().compute_output_spec(*args, **kwargs)
        hidden_states = first_argument(args, kwargs)
        cache, slots = kwargs.get(self.cache_argument), hidden_states.shape[1]
        if isinstance(cache, tuple):
            slots = None if cache[0] is None else cache[0].shape[2]
        taps = {
            tap.part: tap.tap_spec(hidden_states, slots) for tap in self._taps()
        }
        if not taps:
            return outputs
        return (*(outputs if isinstance(cache, tuple) else (outputs,)), taps)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        if block_call.takes_part(self):
            return layer_call
        return super().rematerialized_call(layer_call, *args, **kwargs)

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

    @property
    def part_paths(self):
        """Dictionary from the names of parts to paths of attributes.

        A path leads through the block to the layer: `("attention",
        "query_dense")`.
        """
        projections = getattr(self, self.attention_name).projections
        paths = {
            f"attention.{name}": (self.attention_name, attribute)
            for name, attribute in projections.items()
        }
        paths |= {
            name: tuple(attribute.split("."))
            for name, attribute in self.parts.items()
        }
        return dict(sorted(paths.items()))

    def _check_fits(self, x):
        """Raises a `ValueError` if the block was built for another size."""
        shapes = self.get_build_config() or {}
        shapes = shapes.get("shapes_dict", shapes)
        for shape in shapes.values():
            if shape is not None and shape[-1] != x.shape[-1]:
                raise ValueError(
                    f"Expected decoder block {self.name!r}, which was built "
                    f"for hidden states of size {shape[-1]}, to get such. "
                    f"Received: shape={tuple(x.shape)}. Only blocks of the "
                    "same hidden size go into one model."
                )

    def mask_unless_cached(self, upstream_mask, **kwargs):
        """Upstream's attention mask, where upstream's attention will use it.

        Args:
            upstream_mask: The upstream method that makes the mask.
            **kwargs: Its arguments, the cache among them.
        """
        cache = kwargs[self.cache_argument]
        if isinstance(cache, tuple):
            if not isinstance(cache, LayerCache) or cache.in_use:
                return None
            kwargs[self.cache_argument] = None
        return upstream_mask(**kwargs)


def specialize(layer, cls):
    """Gives a layer that upstream built the class that adds our behaviour.

    An upstream constructor decides which layers it builds. Rather than write
    that constructor again, or build every layer twice, we let it run and then
    assign `__class__`. That is safe because `cls` adds methods and no state:
    weights, names, paths and configuration stay what they were.

    Args:
        layer: A layer built by upstream, changed in place.
        cls: A subclass of the layer's class **with the same name**. Keras lays
            weight files out by class name, so under another name the layer
            would write files that upstream cannot read.

    Raises:
        TypeError: If `cls` is no subclass of the layer's class, or is named
            differently.
    """
    if isinstance(layer, cls):
        return
    if not issubclass(cls, type(layer)) or cls.__name__ != type(layer).__name__:
        raise TypeError(
            "Expected a subclass with the same name as the class of the "
            f"layer to specialize, {type(layer).__module__}."
            f"{type(layer).__name__}. Received: {cls.__module__}."
            f"{cls.__name__}. Name the subclass after the class that it "
            "extends."
        )
    layer.__class__ = cls
    if isinstance(layer, DecoderBlock):
        # See `CachedBlock.__call__`: the constructor of `cls` did not run.
        layer.autocast = False
        layer.specialize_attention()
