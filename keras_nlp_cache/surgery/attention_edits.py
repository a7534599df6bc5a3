"""Edits of the projections of decoder blocks, and of how they attend."""

import keras

from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.quantization.quantizing import floating_policy
from keras_nlp_cache.surgery import newcomers
from keras_nlp_cache.surgery.adapters import AttentionSink
from keras_nlp_cache.surgery.adapters import LowRankAdapter
from keras_nlp_cache.surgery.adapters import ScaledHeads
from keras_nlp_cache.surgery.part_layers import WeightsTap
from keras_nlp_cache.surgery.parts import change_part
from keras_nlp_cache.surgery.parts import check_fits
from keras_nlp_cache.surgery.parts import EditedBlocks
from keras_nlp_cache.surgery.parts import names_of
from keras_nlp_cache.surgery.parts import Part
from keras_nlp_cache.surgery.parts import WEIGHTS
from keras_nlp_cache.surgery.positionwise import check_attention
from keras_nlp_cache.surgery.rewiring import backbone_of
from keras_nlp_cache.surgery.rewiring import EditError
from keras_nlp_cache.surgery.rewiring import rewire_sites
from keras_nlp_cache.surgery.selection import select_blocks

_FURTHER = ("mask", "scale", "soft_cap", "dropout")
PROJECTIONS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.output",
    "gate": "feedforward.gate",
    "up": "feedforward.up",
    "down": "feedforward.down",
    "query_key_value": "attention.query_key_value",
}


def replace_projections(model, where, projections, layer):
    """Replaces projections of decoder blocks.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        projections: `"query"`, `"key"`, `"value"` and `"output"` of attention,
            `"up"`, `"down"` and, where there is one, `"gate"` of the
            feed-forward network, or a list of these. A family that projects to
            the first three at once has `"query_key_value"` in their place.
        layer: Function that takes the projection and returns the layer to put
            in its place, which may call the projection. The first three
            project `(B, T, hidden_dim)` to `(B, T, heads, head_dim)`, the
            fourth projects `(B, T, query_heads, head_dim)` to `(B, T,
            hidden_dim)`, in some families with the heads in a row. Those of the
            feed-forward network project from and to `(B, T, hidden_dim)`, with
            `(B, T, intermediate_dim)` between.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If something else than decoder blocks is selected, a
            projection is unknown or the family has none such, or the layer
            does not fit or mixes positions.

    Example:
    ```python
    def copy_of(projection):
        return type(projection).from_config(projection.get_config())

    edited = surgery.replace_projections(backbone, 0, ["query", "key"], copy_of)
    ```

    Reference:
        https://github.com/keras-team/keras-hub/pull/1598
    """
    if isinstance(projections, str):
        projections = [projections]
    projections = list(projections)
    if not projections or not set(projections) <= set(PROJECTIONS):
        raise ValueError(
            f"Expected `projections` to be some of {list(PROJECTIONS)}. "
            f"Received: {projections}."
        )
    if isinstance(layer, keras.layers.Layer) or not callable(layer):
        raise ValueError(
            "Expected `layer` to be a function that takes a projection and "
            f"returns the layer to put in its place. Received: {layer!r}."
        )
    names = [PROJECTIONS[name] for name in projections]

    backbone = backbone_of(model)

    def change(part, old):
        new = newcomers.inside(layer(old), backbone, old)
        check_fits(new, part.name, *part.shapes)
        return new

    return _edit(model, where, names, change)


def replace_attention(model, where, function):
    """Replaces how the attention layers of decoder blocks attend.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        function: Function that takes the attention layer and returns a layer
            to be called as `keras_nlp_cache.attention.attend()` is, with the
            arguments `query`, `key`, `value`, `mask`, `scale`, `soft_cap` and
            `dropout`; in families that have such, with `sink` or `bias`, too.
            It is called with and without a cache.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If something else than decoder blocks is selected, or the
            layer returns another shape than `query` has, mixes queries, or
            sees what the mask hides.

    Example:
    ```python
    edited = surgery.replace_attention(
        backbone, slice(None), lambda attention: surgery.AttentionSink()
    )
    ```
    """

    def change(part, attention):
        new = function(attention)
        if not isinstance(new, keras.layers.Layer):
            raise EditError(
                "Expected `function` to return a Keras layer that is called "
                f"as `attend()` is. Received: {new!r}."
            )
        _check_attention(new, attention, part.stream_shape)
        if isinstance(
            getattr(attention, "replaced_attention", None), WeightsTap
        ):
            raise EditError(
                f"Expected {part.name!r} not to be tapped, since it is to be "
                "computed in another way. Tap afterwards."
            )
        return share(attention, replaced_attention=new)

    return _edit(model, where, [WEIGHTS], change)


def add_lora(model, where, rank, projections=("query", "value"), alpha=None):
    """Puts trainable low-rank adapters on projections.

    The original weights are left as they are, trainable or not; to train the
    adapters alone, set `trainable` of what else is not to be trained.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        rank: int. The rank of the adapters.
        projections: Which projections, of attention and of the feed-forward
            network. See `replace_projections()`.
        alpha: Optional float. The adapters are scaled by `alpha / rank`.

    Returns:
        A model of the same class, with the outputs of `model` until its
        adapters are trained.

    Example:
    ```python
    adapted = surgery.add_lora(backbone, slice(None), rank=4)
    everywhere = surgery.add_lora(
        backbone, slice(None), 4, ["query", "key", "value", "output", "up"]
    )
    ```

    Reference:
        https://arxiv.org/abs/2106.09685,
        https://github.com/keras-team/keras-hub/issues/1821
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"Expected `rank` to be a positive integer. Received: {rank!r}."
        )

    def adapter(projection):
        return LowRankAdapter(
            projection,
            rank,
            alpha,
            dtype=floating_policy(projection),
            name=f"{projection.name}_adapter",
        )

    return replace_projections(model, where, projections, adapter)


def ablate_heads(model, where, heads):
    """Silences attention heads.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        heads: Index of a query head, or a list of them.

    Returns:
        A model of the same class. The output projections of the selected
        blocks have a weight `scale` with a factor for each head, which may be
        assigned at any time.

    Raises:
        ValueError: If there is no such head.

    Example:
    ```python
    ablated = surgery.ablate_heads(backbone, 0, heads=[1, 2])
    ```
    """
    heads = [heads] if hasattr(heads, "__index__") else list(heads)

    def change(part, old):
        takes, returns = part.shapes
        count = part.query_heads
        if not heads or not all(-count <= i < count for i in heads):
            raise EditError(
                f"Expected `heads` to be some of the {count} heads of "
                f"{part.name!r}. Received: {heads}."
            )
        scale = [1.0] * count
        for i in heads:
            scale[i] = 0.0
        new = ScaledHeads(
            old, scale, dtype=floating_policy(old), name=f"{old.name}_heads"
        )
        check_fits(new, part.name, takes, returns)
        return new

    return _edit(model, where, ["attention.output"], change)


def add_attention_sink(model, where, initial=0.0):
    """Lets attention heads attend to nothing, as far as they learn to.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        initial: float. The logit of nothing, for each head, to start with.

    Returns:
        A model of the same class, with a trainable weight `sink` for each
        selected block.

    Example:
    ```python
    edited = surgery.add_attention_sink(backbone, slice(None), initial=-4.0)
    ```

    Reference:
        https://arxiv.org/abs/2309.17453
    """
    return replace_attention(
        model,
        where,
        lambda attention: AttentionSink(
            initial,
            dtype=floating_policy(attention),
            name=f"{attention.name}_sink",
        ),
    )


def _edit(model, where, names, change):
    """Changes parts of decoder blocks.

    Args:
        model: A backbone or a `CausalLM`.
        where: Which decoder blocks. See `select()`.
        names: The names of the parts.
        change: Function from a `Part` and the layer that it is to the layer in
            its place.
    """
    chosen = [
        Part(f"{site.name}.{name}", name, site)
        for site in select_blocks(model, where)
        for name in names
    ]
    for part in chosen:
        has = names_of(part.site.layer)
        if part.part == WEIGHTS and WEIGHTS not in has:
            raise ValueError(
                f"Expected {part.site.name!r} to attend to tokens. Received: a "
                "block whose layers keep a state, and have no attention "
                "weights."
            )
        if part.part not in has:
            short = [x for x, name in PROJECTIONS.items() if name in has]
            raise ValueError(
                f"Expected projections that {part.site.name!r} has, some of "
                f"{short}. Received one that it has not: {part.part!r}."
            )
    blocks = EditedBlocks(
        model,
        chosen,
        lambda block, part: change_part(
            block, part, lambda old: change(part, old)
        ),
    )
    return rewire_sites(
        model, lambda site, *args, **kwargs: blocks.layer(site)(*args, **kwargs)
    )


def _check_attention(new, attention, input_shape):
    query_heads = attention.compute_query_shape(input_shape)[2]
    heads, head_dim = attention.key_value_shape
    shape = (None, None, query_heads, head_dim)
    cache = keras.KerasTensor((None, heads, None, head_dim), new.compute_dtype)
    further = {}
    if attention.sink is not None:
        further["sink"] = keras.KerasTensor((query_heads,))
    if attention.logits_bias is not None:
        further["bias"] = keras.KerasTensor((None, query_heads, None, None))
    try:
        received = new(
            query=keras.KerasTensor(shape, new.compute_dtype),
            key=cache,
            value=cache,
            mask=keras.KerasTensor((None, 1, None, None)),
            scale=attention.scale,
            soft_cap=attention.soft_cap,
            dropout=None,
            **further,
        ).shape
    except Exception as e:
        received = f"{type(e).__name__}: {e}"
    if received != shape:
        raise EditError(
            f"Expected the attention function {new.name!r} to turn queries of "
            f"shape {shape} and keys and values of shape {cache.shape} into an "
            f"output of shape {shape}. It is called with "
            f"{['query', 'key', 'value', *_FURTHER, *further]}, by name. "
            f"Received: {received}."
        )
    check_attention(new, query_heads, heads, head_dim, tuple(further))
