"""How a cache is threaded through a graph whose decoder has an encoder."""

import collections

import keras
from keras import tree

from keras_nlp_cache.blocks.replaying import replaying
from keras_nlp_cache.cache.layer_cache import LayerCache
from keras_nlp_cache.cache.source_inputs import EncoderMask
from keras_nlp_cache.cache.source_inputs import EncoderOutput
from keras_nlp_cache.cache.source_inputs import JoinedSource
from keras_nlp_cache.cache.source_inputs import SourceMask
from keras_nlp_cache.graph.constructed import comes_of
from keras_nlp_cache.graph.wiring import Wiring
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.block_call import sequence_first


class EncoderWiring(Wiring):
    """The inputs of one graph, and what is threaded through it.

    What the encoder returns is one more optional input, and where it is
    returned the graph is cut. So it is where what else the encoder reads is
    joined with its text, which goes on alone if there is nothing else.

    Args:
        dtype: As for `Wiring`, like the next two.
        graph: Optional `keras.Function`.
        roles: `Roles`.
        source: Symbolic tensor `(B, S, source_dim)`, what the encoder of
            upstream's graph returns.
        mask: Optional symbolic tensor `(B, S)`, which of that is padding, if
            upstream's graph says so of something else.
        reads: Without a graph, dictionary of symbolic tensors like what the
            encoder reads.

    Attributes:
        encoder_blocks: The blocks of the encoder, in the order in which they
            were called.
        encoded: For each entry of the cache, whether it is of what the encoder
            returned.
    """

    def __init__(self, dtype, graph, roles, source, mask=None, reads=None):
        super().__init__(dtype, graph, roles)
        for name, x in (reads or {}).items():
            self.inputs[name] = keras.Input(
                x.shape[1:], dtype=x.dtype, name=name, optional=True
            )
        self._source, self._mask_of_source = source, mask
        self._calls = collections.Counter()
        self._joins = 0
        self._source_masks = {}
        self.encoder_blocks, self.encoded = [], []
        # What the last block of the encoder and of the decoder was called with.
        self._sides = {}
        # The layer that attends across in the block under way, to what, and
        # which of that is padding.
        self._across = None, None, None
        self.inputs[roles.source] = keras.Input(
            source.shape[1:],
            dtype=source.dtype,
            name=roles.source,
            optional=True,
        )

    def call_operation(self, operation, args, kwargs):
        x = super().call_operation(operation, args, kwargs)
        text = self._text_alone(args, kwargs)
        if text is not None:
            name = f"joined_source_{self._joins}"
            self._joins += 1
            x = JoinedSource(dtype=self._dtype, name=name)(x, text=text)
        here = operation, self._calls[operation]
        self._calls[operation] += 1
        if here == _call_of(self._source):
            return EncoderOutput(dtype=self._dtype, name="encoder_output")(
                x, given=self.inputs[self._roles.source]
            )
        mask = self._mask_of_source
        if mask is not None and here == _call_of(mask):
            return EncoderMask(dtype=self._dtype, name="encoder_mask")(
                x, given=self.inputs[self._roles.source_mask]
            )
        return x

    def _text_alone(self, args, kwargs):
        """What an operation joins with something else that the encoder reads.

        Returns:
            A symbolic tensor, `None` if it joins nothing.
        """
        beside = [self.inputs[x] for x in self._roles.beside_source]
        names = self._roles.source_ids, self._roles.source_mask
        text = [self.inputs[x] for x in names]
        alone = {True: [], False: []}
        for x in tree.flatten((args, kwargs)) if beside else ():
            if not isinstance(x, keras.KerasTensor):
                continue
            of_text, of_others = (
                any(comes_of(x, y) for y in inputs) for inputs in (text, beside)
            )
            if of_text != of_others:
                alone[of_text].append(x)
        if not all(alone.values()):
            return None
        (x,) = alone[True]
        return x

    def call_block(self, block, args, kwargs):
        """Calls a block of the decoder, or of the encoder if it is one.

        As for `Wiring`. All that the block before was called with may be left
        out, too.
        """
        args, kwargs = block.arranged(args, kwargs)
        completed = self._completed("decoder", block, kwargs)
        source = completed.get(block.source_argument)
        if not block.built:
            block.build_on(first_argument(args, kwargs), source)
        if not block.remembering():
            with replaying(None):
                return self.call_encoder_block(block, args, kwargs)
        mask = self.inputs[self._roles.source_mask]
        if block.source_mask_argument is not None:
            mask = completed.get(block.source_mask_argument)
        self._across = block.attention_across(), source, mask
        self._joined = set()
        outputs = super().call_block(block, args, completed)
        self._note("decoder", block, completed, outputs)
        return outputs

    def call_encoder_block(self, block, args, kwargs):
        """Calls a block of an encoder, which remembers nothing.

        Args:
            block: A layer.
            args: Its positional arguments, symbolic hidden states first.
            kwargs: Its other arguments. What the block before was called with
                may be left out.

        Returns:
            What the block returns, symbolically.
        """
        args, kwargs = sequence_first(block, args, kwargs)
        # For blocks that follow to find them.
        names = block.call_signature_parameters
        kwargs = {**dict(zip(names[1:], args[1:])), **kwargs}
        args, kwargs = args[:1], self._completed("encoder", block, kwargs)
        outputs = block(*args, **kwargs)
        self._note("encoder", block, kwargs, outputs)
        self.encoder_blocks.append(block)
        return outputs

    def _completed(self, side, block, kwargs):
        """Arguments of a block, with those of the one before it."""
        before = self._sides.get(side, {})
        return {**self._of_signature(block, before), **kwargs}

    def _completed_text(self, kwargs):
        return kwargs  # They were completed.

    def _note(self, side, block, kwargs, outputs):
        further = outputs[1:] if isinstance(outputs, tuple) else ()
        carried = zip(getattr(block, "carries", ()), further)
        self._sides[side] = {**kwargs, **dict(carried)}

    def _new_entry(self, layer, is_encoded=False):
        self.encoded.append(is_encoded)
        entry = super()._new_entry(layer)
        if is_encoded:
            self.windows[-1] = None  # Which is of the text.
        return entry

    def _entry(self, layer):
        across, source, padding_mask = self._across
        if layer is across and layer.joins_source:
            is_text = layer not in self._joined
            self._joined.add(layer)
        else:
            is_text = layer is not across
        if is_text:
            return super()._entry(layer)
        key, value = self._new_entry(layer, is_encoded=True)
        which = id(source), layer.joins_source
        if which not in self._source_masks:
            name = f"source_mask_{len(self._source_masks)}"
            self._source_masks[which] = SourceMask(
                dtype=self._dtype, name=name
            )(
                source,
                padding_mask=padding_mask,
                key=key,
                positions=self.positions if layer.joins_source else None,
            )
        return LayerCache(key=key, value=value, mask=self._source_masks[which])


def _call_of(tensor):
    """The operation that returned a symbolic tensor, and which call of it."""
    history = tensor._keras_history
    return history.operation, history.node_index
