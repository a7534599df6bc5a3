"""The one operation that all surgery is made of."""

import contextlib

import keras

from keras_nlp_cache.blocks.encoder_block import hidden_states_alone
from keras_nlp_cache.blocks.replaying import replaying
from keras_nlp_cache.generate.causal_lm import CausalLM
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.layers.block_call import collecting_taps
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.block_call import sequence_first
from keras_nlp_cache.surgery.positionwise import check_positionwise


def rewire(model, call_function):
    """Builds a model anew, with a say in every call of its graph.

    The functional graph is replayed on new inputs. For each call of a layer,
    `call_function` is called in its stead, and what it returns is what later
    layers see. It may call the layer, call something before or after it, call
    another layer, or return its input.

    Decoder blocks take hidden states and return hidden states here. Their
    caches are threaded for them: each call of a block gets a cache of its own,
    so `make_cache()` and generation follow the edited graph.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        call_function: Function `(layer, *args, **kwargs)`, called with each
            layer (or other Keras operation) of the backbone's graph and the
            symbolic arguments that it would be called with. Returns a symbolic
            tensor of the same shape as the layer would.

    Returns:
        A model of the same class that shares layers and weights with `model`.
        A `CausalLM` is compiled as `model` is, with its sampler and an
        optimizer of its own.

    Raises:
        ValueError: If `model` is none of this package, if a call fails or
            changes a shape, if no decoder block remains, or if the edited graph
            could not generate through a cache because a layer other than a
            decoder block mixes positions.

    Example:
    ```python
    def skip_odd_blocks(layer, x, *args, **kwargs):
        if layer in backbone.blocks[1::2]:
            return x
        return layer(x, *args, **kwargs)

    shallow = surgery.rewire(backbone, skip_odd_blocks)
    cache = shallow.make_cache(batch_size=1, max_length=8)
    ```

    Reference:
        `keras.models.clone_model(model, call_function=...)` came out of
        https://github.com/keras-team/keras/pull/19600. It gives a functional
        model with inputs of its own and not the class of `model`, so there is
        no cache, no preset and no task around it, and it clones layers unless
        told otherwise. Here the edited model is the backbone itself, over the
        same layers, and generation follows it.
    """
    return rewire_sites(
        model,
        lambda site, *args, **kwargs: call_function(
            site.layer, *args, **kwargs
        ),
    )


def backbone_of(model):
    """The backbone of a task, or a backbone itself.

    Raises:
        ValueError: If `model` is neither a backbone nor a `CausalLM` of this
            package.
    """
    backbone = model.backbone if isinstance(model, CausalLM) else model
    if not isinstance(backbone, CachedBackbone):
        raise ValueError(
            "Expected `model` to be a backbone or a `CausalLM` of "
            "`keras_nlp_cache.models`. Received an instance of "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    return backbone


def rewire_sites(model, call_function, tapped=(), replaced=None):
    """Like `rewire()`, for edits that tell calls of the same layer apart.

    Args:
        model: A backbone or a `CausalLM`.
        call_function: Function `(site, *args, **kwargs)`, called with each
            `Site` of the backbone.
        tapped: Sites and parts whose result the new backbone is to return,
            too.
        replaced: Optional dictionary from the `id()` of layers to those in
            their place. Attributes of the backbone, such as its
            `token_embedding`, follow.
    """
    backbone = backbone_of(model)
    wiring = backbone.new_wiring()
    taps = {}

    def call(site, *args, **kwargs):
        first, *_ = (*getattr(site.layer, "call_signature_parameters", ()), "")
        if not args and first in kwargs:
            # Upstream calls some layers by keyword alone.
            args, kwargs = sequence_first(site.layer, args, kwargs)
        try:
            with collecting_taps() as inside:
                x = hidden_states_alone(call_function(site, *args, **kwargs))
        except EditError:
            raise
        except Exception as e:
            received = getattr(first_argument(args, kwargs), "shape", None)
            raise EditError(
                f"The edit at layer {site.name!r} failed. Expected it to turn "
                f"inputs of shape {received} into outputs of shape "
                f"{site.shape}. Received {type(e).__name__}: {e}"
            ) from e
        received = getattr(x, "shape", None)
        if not isinstance(x, keras.KerasTensor) or received != site.shape:
            raise EditError(
                f"Expected the edit at layer {site.name!r} to return a "
                f"symbolic tensor of shape {site.shape}, as the layer does. "
                f"Received: {type(x).__name__} of shape {received}."
            )
        for place in tapped:
            if place == site:
                taps[place.name] = x
            elif getattr(place, "site", None) == site:
                taps[place.name] = inside[place.part]
        return x

    if backbone.takes_generated:
        _ = wiring.generated
    with _undone_on_error(backbone), replaying(wiring):
        inputs = {
            **wiring.inputs,
            "cache": [None] * len(backbone.cache_spec) * 2,
        }
        hidden_states, kept = backbone.replay(inputs, wiring.positions, call)
        if not wiring.blocks:
            raise EditError(
                "Expected at least one decoder block to remain. Received an "
                "edit that removes all of them."
            )
        edited = backbone.with_graph(
            wiring, hidden_states, {**kept, **taps}, replaced or {}
        )
        check_positionwise(edited, original=backbone)
    if model is backbone:
        return edited
    return _with_backbone(model, edited)


class EditError(ValueError):
    """An edit that cannot be made, explained at the time of the edit."""


@contextlib.contextmanager
def _undone_on_error(backbone):
    """Takes a graph that came to nothing off the layers of a backbone."""
    operations = {id(site.layer): site.layer for site in backbone.sites}
    nodes = {
        key: (len(x._inbound_nodes), len(x._outbound_nodes))
        for key, x in operations.items()
    }
    try:
        yield
    except BaseException:
        for key, (inbound, outbound) in nodes.items():
            del operations[key]._inbound_nodes[inbound:]
            del operations[key]._outbound_nodes[outbound:]
        raise


def _with_backbone(lm, backbone):
    """Makes a task like another one, on another backbone."""
    config = lm.get_config()
    config.update(backbone=backbone, preprocessor=lm.preprocessor)
    new = type(lm)(**config, compile=False)
    new.chat_template = lm.chat_template
    if lm.compiled:
        # Optimizers and metrics keep variables for the weights of one model.
        compile_config = keras.tree.map_structure(
            lambda x: (
                type(x).from_config(x.get_config())
                if isinstance(x, keras.Optimizer | keras.Metric)
                else x
            ),
            dict(lm._compile_config.config),
        )
        new.compile(
            **compile_config, sampler=lm.sampler, cache_dtype=lm.cache_dtype
        )
    return new
