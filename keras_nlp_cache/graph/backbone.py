"""A backbone whose functional graph takes a cache.

`CachedBackbone` stands between an upstream backbone and
`keras_hub.models.Backbone`. The upstream constructor builds its layers and its
graph and hands the graph on with `super().__init__(inputs=, outputs=)`, which
arrives here: the graph is replayed once more with the optional inputs, and the
replayed graph is what the model is made of.
"""

import contextlib
import contextvars
import functools
import weakref

import keras
import keras_hub
from keras import tree
from keras.src.models.functional import Functional
from keras.src.ops.function import make_node_key
from keras.src.ops.node import KerasHistory
from keras_hub.src.utils.python_utils import classproperty

from keras_nlp_cache import drop_in
from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import hidden_states_alone
from keras_nlp_cache.blocks.replaying import replaying
from keras_nlp_cache.cache.shared_inputs import Positions
from keras_nlp_cache.cache.shared_inputs import Weightless
from keras_nlp_cache.files.preset_loader import dtype_in
from keras_nlp_cache.graph import lora_file
from keras_nlp_cache.graph import saving
from keras_nlp_cache.graph.calling import CachedGraph
from keras_nlp_cache.graph.calling import dense
from keras_nlp_cache.graph.calling import flatten
from keras_nlp_cache.graph.calling import plain_python
from keras_nlp_cache.graph.constructed import check_blocks
from keras_nlp_cache.graph.constructed import check_graph
from keras_nlp_cache.graph.constructed import learned_positions
from keras_nlp_cache.graph.constructed import positioned_layers
from keras_nlp_cache.graph.constructed import return_hidden_states_alone
from keras_nlp_cache.graph.kept_weights import loader_of
from keras_nlp_cache.graph.sites import Site
from keras_nlp_cache.graph.sites import sites_of
from keras_nlp_cache.graph.wiring import Wiring
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers.block_call import collecting_carried
from keras_nlp_cache.layers.block_call import collecting_taps
from keras_nlp_cache.layers.sharing import attributes
from keras_nlp_cache.layers.specializing import specialize_within
from keras_nlp_cache.products.grouped_layers import have_groups
from keras_nlp_cache.quantization.logits import mend_quantized
from keras_nlp_cache.quantization.quantizing import floating_policy
from keras_nlp_cache.quantization.quantizing import policies
from keras_nlp_cache.quantization.quantizing import quantizing
from keras_nlp_cache.quantization.quantizing import use_own_policies

_without_taps = contextvars.ContextVar(
    "keras_nlp_cache_without_taps", default=False
)


@contextlib.contextmanager
def without_taps():
    """In this scope, backbones return no taps.

    Tasks build on the hidden states. What else a backbone was made to return
    stays with the backbone.
    """
    token = _without_taps.set(True)
    try:
        yield
    finally:
        _without_taps.reset(token)


# `Functional` is named as a base because Keras adds it by rewriting the bases
# of every path to `keras.Model`, and trips over a class with two of them.
class CachedBackbone(CachedGraph, keras_hub.models.Backbone, Functional):
    """Base of all backbones of this package: a graph with a cache in it.

    A model family subclasses its upstream backbone and this class, in that
    order. The layers that upstream builds get the classes that stand in for
    theirs, see `specialize_within()`.

    Attributes:
        blocks_name: Name of the attribute that lists the decoder blocks.
        only_as_constructed: Names of attributes that speak of the graph as it
            was constructed, and that no edited backbone has.

    Call arguments:
        inputs: A dictionary. Only `"token_ids"` is required; every other key
            may be left out or `None`. Values may be NumPy arrays, Python
            numbers or backend tensors, in any mixture.

            - `"token_ids"`: int, `(B, T)`.
            - `"padding_mask"`: bool or int, 0 for padding. `(B, T)` without a
              cache, `(B, S)` with one, where `S` is the cache's length.
            - `"cache"`: from `make_cache()` or an earlier call.
            - `"cache_update_index"`: int, `()` or `(B,)`, the slot of the first
              token, in all rows or in each. Goes with `"cache"`.
            - `"token_positions"`: int, `(B, T)`. Where each token stands in
              the text. Defaults to its slot. A sliding window counts them. A
              cache does not remember them: tokens of earlier calls are taken
              to stand right before the first token of this call, with no gap
              between them and no position for padding (see `padding_mask`).
            - `"attention_mask"`: `(B, T, S)`, bool or int with 0 where a
              token may not attend, or floating and added to the logits.

    Returns:
        Hidden states `(B, T, hidden_dim)`. With a cache, a pair of these and
        the updated cache; the cache passed in is not modified.

    Example:
    ```python
    backbone = LlamaBackbone(
        vocabulary_size=100, num_layers=2, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
    )
    token_ids = np.array([[1, 2, 3, 4]])
    full = backbone({"token_ids": token_ids})

    cache = backbone.make_cache(batch_size=1, max_length=4)
    prefill, cache = backbone({
        "token_ids": token_ids[:, :3],
        "cache": cache,
        "cache_update_index": 0,
    })
    step, cache = backbone({
        "token_ids": token_ids[:, 3:],
        "cache": cache,
        "cache_update_index": 3,
    })
    # `full[:, 3:]` and `step` are equal.
    ```

    Reference:
        https://github.com/keras-team/keras-hub/issues/1862
    """

    # An edited model is saved with its graph.
    _edited = False
    _replaced_attributes = frozenset()

    blocks_name = "transformer_layers"
    only_as_constructed = ()
    _mask_of_source = None

    def __init__(self, inputs, outputs, **kwargs):
        if not self.blocks:
            raise ValueError(
                "Expected a backbone of at least one decoder block. Received: "
                f"{type(self).__name__} with `num_layers=0`."
            )
        outputs = self.inlined(outputs)
        check_graph(self, inputs, outputs)
        self._source = self._output_of_encoder(outputs)
        graph = keras.Function(inputs, outputs)
        layers = [
            x for x in graph.operations if isinstance(x, keras.layers.Layer)
        ]
        specialize_within(layers)
        check_blocks(self)
        return_hidden_states_alone(self.blocks)
        positioned = positioned_layers(layers)
        self.mend()
        mend_quantized(self.output_embedding)
        have_groups(layers)
        # The numbers by which a saved edit refers to layers. Weak, for an edit
        # that removes a layer not to keep it.
        self._constructed = weakref.WeakKeyDictionary()
        for i, layer in enumerate(graph.operations):
            if isinstance(layer, keras.layers.Layer):
                self._constructed[layer] = i
        wiring = self.new_wiring(graph)
        hidden_states = wiring.thread(self._of_the_text(positioned))
        self._set_graph(wiring, hidden_states, taps={}, **kwargs)
        self._order_as_constructed()
        self._output_without_cache = outputs

    def inlined(self, outputs):
        """What upstream's graph returns, with all blocks in that graph itself.

        For families that call a model inside of their backbone. See
        `HasLanguageModel`.

        Args:
            outputs: What upstream's graph returns.
        """
        return outputs

    def _order_as_constructed(self):
        """Lists layers in upstream's order, which is that of weights in files.

        Of two branches of a graph, a layer more in one comes before others.
        """
        listed = self._as_constructed(self._layers, self._operations)
        self._operations = self._as_constructed(self._operations)
        # A list that Keras tracks.
        self._layers[:] = listed

    def _as_constructed(self, layers, only_if_as=None):
        """The same layers, with those of upstream in the order of its graph.

        Args:
            layers: List of layers.
            only_if_as: Optional list. Where layers are listed in another order
                than there, as by attributes, it stays.
        """

        def of_upstream(layers):
            return [x for x in layers if x in self._constructed]

        ours = of_upstream(layers)
        if only_if_as is not None and ours != of_upstream(only_if_as):
            return list(layers)
        ordered = iter(sorted(ours, key=self._constructed.get))
        return [next(ordered) if x in self._constructed else x for x in layers]

    def mend(self):
        """Puts right what upstream's constructor got wrong in its layers.

        For families whose weights were trained on something else than what
        upstream computes, where an attribute of a layer makes the difference.
        What is computed with a cache and without one is then right.
        """

    @property
    def output_embedding(self):
        """The layer that turns hidden states into logits."""
        return self.token_embedding

    @staticmethod
    def hidden_states_of(outputs):
        """What becomes of the text, of what is returned without a cache."""
        return outputs

    def new_wiring(self, graph=None):
        """A `Wiring` for a graph with the inputs of this one.

        Args:
            graph: Optional `keras.Function`, whose inputs to take.
        """
        return Wiring(floating_policy(self.blocks[0]), graph, self.roles)

    def _output_of_encoder(self, outputs):
        """What of upstream's outputs decoder blocks read, if they do."""
        return None

    def _of_the_text(self, layers):
        """Those of some layers that are not called on something else."""
        return layers

    @property
    def max_positions(self):
        return learned_positions(self.operations)

    def _set_graph(self, wiring, hidden_states, taps, **kwargs):
        """Makes a wired graph the one that the model is made of."""
        inputs, outputs = wiring.graph(hidden_states, dict(taps))
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self._positions = wiring.positions
        self._calls_of_blocks = tuple(wiring.calls)
        self.cache_windows = tuple(wiring.windows)
        # Losses and metrics see the hidden states alone.
        self.output_names = self.output_names[:1]

    @property
    def blocks(self):
        """The decoder blocks, in the order of their caches."""
        return getattr(self, self.blocks_name)

    @property
    def rows(self):
        """How many rows a batch has to have, `None` if any number will do.

        Some layers, such as a control vector with a strength for each row,
        treat each row in its own way, and say so by an attribute `rows`.
        """
        for layer in self._flatten_layers(include_self=False):
            if isinstance(getattr(layer, "rows", None), int):
                return layer.rows
        return None

    @property
    def taps(self):
        """Names of the activations that are returned beside the output."""
        return tuple(self._outputs_struct[2])

    def __reduce__(self):
        _, args = super().__reduce__()
        return drop_in.unpickle, args

    # === The graph ===

    @property
    def sites(self):
        """The calls of layers that the graph is made of, as `Site`s."""
        return sites_of(self)

    def replay(self, inputs, positions, call):
        """Runs through the graph without its caches.

        Args:
            inputs: Dictionary with all inputs, and no cache.
            positions: What to pass to layers that take `positions`.
            call: Function `(site, *args, **kwargs)` that stands in for each
                call. Decoder blocks come without the cache in their arguments
                and are to return hidden states.

        Returns:
            `(hidden_states, taps)`.
        """
        sites = iter(self.sites)

        def operation_fn(operation):
            if isinstance(operation, Positions):
                return lambda *args, **kwargs: positions
            if isinstance(operation, Weightless):
                return lambda *args, **kwargs: None
            site = next(sites)

            def stand_in(*args, **kwargs):
                with collecting_taps() as taps, collecting_carried() as further:
                    x = dense(call(site, *args, **site.without_entries(kwargs)))
                    if not isinstance(site.layer, DecoderBlock):
                        return (x, *further) if further else x
                    x = hidden_states_alone(x)
                # What a block does not return goes on as it came.
                carried = [kwargs.get(name) for name in site.layer.carries]
                further = [*further, *carried[len(further) :]]
                count = 0
                if "entries" in site.node.arguments.kwargs:
                    count = 2 * site.layer.entry_count
                tapped = [taps.get(part) for part in site.layer.tapped_parts]
                return x, *further, *[None] * count, *tapped

            return stand_in

        x, _, taps = super()._run_through_graph(
            tree.flatten(inputs), operation_fn
        )
        # Of a block that is not called any more, there is nothing to tap.
        return x, {name: y for name, y in taps.items() if y is not None}

    def with_graph(self, wiring, hidden_states, taps, replaced):
        """Makes a backbone of the same class and layers over another graph.

        Args:
            wiring: The `Wiring` under which the graph was made.
            hidden_states: What it returns, symbolically.
            taps: Dictionary of further symbolic outputs.
            replaced: Dictionary from the `id()` of layers that are no longer
                in the graph to those in their place. Attributes follow.

        Returns:
            The new backbone. This one is left as it is.
        """
        new = type(self).__new__(type(self))
        new._set_graph(
            wiring,
            hidden_states,
            taps,
            name=self.name,
            dtype=self.dtype_policy,
        )
        new._trainable = self._trainable
        new._replaced_attributes = self._replaced_attributes
        # What the constructor of the family set, but not how it was compiled.
        skip = {*vars(new), "optimizer", "_compile_config", self.blocks_name}
        skip |= set(self.only_as_constructed)
        new._source = self._source
        new._mask_of_source = self._mask_of_source
        in_graph = {id(operation) for operation in new.operations}
        for name, value in attributes(self).items():
            if name in skip:
                continue
            if id(value) in replaced and id(value) not in in_graph:
                value = replaced[id(value)]
                new._replaced_attributes |= {name}
            setattr(new, name, value)
        new._call_without_cache_first()
        new._set_blocks(wiring)
        new._edited = True
        weight_paths.make_distinct(new, kept=self.weights)
        if hasattr(new, "_lora_enabled_layers"):
            # Upstream refers to layers by where they stand.
            new._lora_enabled_layers = [
                i
                for i, layer in enumerate(
                    x for x in new._flatten_layers(False) if x.weights
                )
                if getattr(layer, "lora_enabled", False)
            ]
        return new

    def _set_blocks(self, wiring):
        """Lists the blocks that a graph calls."""
        setattr(self, self.blocks_name, list(wiring.blocks))

    def _call_without_cache_first(self):
        """Calls the layers without a cache, on `input`.

        Of layers that only this graph has, it becomes the first call, the one
        that Keras means by `layer.output`. Layers of the backbone that was
        edited keep theirs, which belongs to that backbone.
        """
        nodes = {x for nodes in self._nodes_by_depth.values() for x in nodes}
        with replaying(None):
            self._output_without_cache = self._without_cache(self.input)
        for operation in self._operations:
            calls = operation._inbound_nodes
            if calls[0] not in nodes:
                continue
            # No `sort()`, which the list that TensorFlow tracks has not.
            calls[:] = sorted(calls, key=lambda node: node in nodes)
            for i, node in enumerate(calls):
                for j, x in enumerate(node.outputs):
                    x._keras_history = KerasHistory(operation, i, j)
        self._nodes = {
            make_node_key(x.operation, x.operation._inbound_nodes.index(x))
            for x in nodes
        }

    def _without_cache(self, inputs, call=lambda operation: operation):
        """Replays the graph symbolically with no cache in it, as upstream's.

        Symbolic outputs cannot be `None`, so where no cache goes in, the
        layers are called as upstream calls them.
        """
        return self.intercepted(
            inputs,
            lambda site, *args, **kwargs: call(site.layer)(*args, **kwargs),
        )

    def intercepted(self, inputs, call):
        """Runs on inputs without a cache, with a say in every call.

        Args:
            inputs: Dictionary, as the model is called with.
            call: As for `replay()`.

        Returns:
            Hidden states `(B, T, hidden_dim)`.
        """
        return self.replay(self._normalize(inputs), None, call)[0]

    def watched(self, inputs, change):
        """Runs as a call without a cache does, with a say in what it computes.

        Args:
            inputs: Dictionary, as the model is called with.
            change: Function `(site, x) -> x`, of what a call of the graph
                returned first, to what the graph is to go on with.

        Returns:
            Hidden states `(B, T, hidden_dim)`.
        """
        sites = iter(self.sites)

        def operation_fn(operation):
            if isinstance(operation, Weightless):
                return operation
            site = next(sites)

            def call(*args, **kwargs):
                x, *further = flatten(operation(*args, **kwargs))
                return change(site, x), *further

            return call

        inputs = flatten(self._normalize(inputs))
        return super()._run_through_graph(inputs, operation_fn)[0]

    def _run_through_graph(
        self, inputs, operation_fn=lambda op: op, call_fn=None
    ):
        # `keras.models.clone_model` replays the graph on `self.input`.
        if isinstance(inputs, dict) and inputs.keys() == self.input.keys():
            if call_fn is None:
                return self._without_cache(inputs, operation_fn)
            return self._without_cache(
                inputs,
                lambda op: functools.partial(call_fn, operation_fn(op)),
            )
        return super()._run_through_graph(inputs, operation_fn, call_fn)

    # === Calling it ===

    def _outputs_for(self, inputs, hidden_states, cache, taps):
        outputs = super()._outputs_for(inputs, hidden_states, cache)
        if not taps or _without_taps.get():
            return outputs
        return *(outputs if isinstance(outputs, tuple) else (outputs,)), taps

    @plain_python
    def __call__(self, inputs, *args, **kwargs):
        inputs = self._normalize(inputs)
        # Spelled out, too, for it has several outputs.
        if self.taps and not _without_taps.get():
            if isinstance(inputs[self.roles.token_ids], keras.KerasTensor):
                if inputs["cache"][0][0] is None:
                    return self.replay(inputs, None, Site.__call__)
        return super().__call__(inputs, *args, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # Its layers are, each for itself. TensorFlow cannot take the backbone
        # as a whole, for inputs that are `None`.
        return layer_call

    @property
    def output(self):
        """The symbolic hidden states that follow from `input` alone."""
        return self._output_without_cache

    def export(
        self,
        filepath,
        format="tf_saved_model",
        verbose=None,
        input_signature=None,
        **kwargs,
    ):
        """Exports the backbone for inference outside of Keras.

        Keras' method, with its arguments. Where Keras would export all inputs
        of the graph as required ones, the signature is by default that of
        upstream's backbone, `token_ids` and `padding_mask`.
        """
        if input_signature is None:
            input_signature = [
                {
                    name: keras.InputSpec(
                        shape=x.shape, dtype=x.dtype, name=name
                    )
                    for name, x in self.input.items()
                }
            ]
        super().export(
            filepath,
            format=format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

    # === Files ===

    def get_config(self):
        quantized = policies(self._flatten_layers(include_self=False))
        dtype = self.dtype_policy
        if quantized and not isinstance(
            dtype, keras.dtype_policies.DTypePolicyMap
        ):
            # Upstream's would not say of which dtype the other layers are.
            dtype = keras.dtype_policies.DTypePolicyMap(dtype, quantized)
            config = {
                "name": self.name,
                "trainable": self.trainable,
                "dtype": keras.dtype_policies.serialize(dtype),
            }
        else:
            config = super().get_config()
        if self._edited:
            # Upstream's constructors pass on what they do not know, together
            # with outputs of their own: they refuse this, rather than build
            # the model as if it had not been edited.
            config["outputs"] = saving.describe(self)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        graph = config.pop("outputs", None)
        backbone = super().from_config(config)
        if graph is not None:
            backbone = saving.apply(backbone, graph)
        use_own_policies(backbone)
        return backbone

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantizes the weights, as `keras.Model.quantize()` does.

        The experts of a mixture stay as they are: they are weights of a layer
        that Keras cannot quantize. Their routers are quantized.
        """
        with quantizing(self):
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def save_lora_weights(self, filepath):
        """Writes adapters, those of `enable_lora()` and those of surgery.

        A file that is there already is replaced when the new one is complete.

        Args:
            filepath: Path that ends in `.lora.h5`.

        Raises:
            ValueError: If there are no adapters, or the path ends in something
                else.
        """
        lora_file.save(self, filepath, super().save_lora_weights)

    def load_lora_weights(self, filepath):
        """Reads adapters into a model that was edited as the saved one was.

        Those of `enable_lora()` are added if the model has none.

        Args:
            filepath: Path of a file that `save_lora_weights()` wrote, here or
                in keras_hub.

        Raises:
            ValueError: If the file and the model have adapters in different
                places or of different ranks. The model is left as it was.
        """
        lora_file.load(self, filepath, super().load_lora_weights)

    def export_to_transformers(self, path):
        """Exports the backbone in the format of Hugging Face Transformers.

        Raises:
            ValueError: If the backbone was edited, which that format has no
                words for, or is of a family that upstream does not export.
        """
        self.refuse_edits("Transformers")
        super().export_to_transformers(path)

    def refuse_edits(self, reader):
        """Raises a `ValueError` if the backbone was edited.

        Args:
            reader: str. Who would run it as if it had not been.
        """
        if self._edited:
            raise ValueError(
                "Expected a backbone that was not edited. Received: "
                f"{self.name!r}, an edited one, which {reader} would run as if "
                "it had not been. Use `save_to_preset()` or `save()`."
            )

    @classproperty
    def presets(cls):
        return drop_in.presets(cls)

    @classmethod
    def from_preset(
        cls, preset, load_weights=True, *, keep_quantized=False, **kwargs
    ):
        """Loads a backbone from a preset that either package saved.

        Takes what `keras_hub.models.Backbone.from_preset()` takes: a built-in
        name, a hub handle, a local preset or Hugging Face directory; or the
        path of a GGUF file. Called on a subclass of your own, returns one.
        For `keep_quantized`, see `CausalLM.from_preset()`.
        """
        with drop_in.scope(*((cls,) if drop_in.family(cls) else ())):
            loader = loader_of(preset, keep_quantized)
            backbone_cls = drop_in.replacement(loader.check_backbone_class())
            if issubclass(cls, backbone_cls):
                backbone_cls = cls
            if not issubclass(backbone_cls, cls):
                raise ValueError(
                    f"Expected a preset of a `{cls.__name__}`. Received: "
                    f"preset={preset!r}, of a `{backbone_cls.__name__}`. Call "
                    "`from_preset` on that class instead."
                )
            if "dtype" in kwargs:
                kwargs["dtype"] = dtype_in(loader, kwargs["dtype"])
            return loader.load_backbone(backbone_cls, load_weights, **kwargs)

    def save_to_preset(self, preset_dir, max_shard_size=10):
        with drop_in.saving_preset(preset_dir) as folder:
            super().save_to_preset(folder, max_shard_size=max_shard_size)
