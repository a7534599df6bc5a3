"""Edits inside the attention layers of decoder blocks.

A block that is edited inside is another block, of the same class and over the
same weights but for what was replaced.
"""

import keras

from keras_nlp_cache.attention import CachedAttention
from keras_nlp_cache.sharing import share
from keras_nlp_cache.surgery.adapters import AttentionSink
from keras_nlp_cache.surgery.adapters import LowRankAdapter
from keras_nlp_cache.surgery.adapters import ScaledHeads
from keras_nlp_cache.surgery.positionwise import check_attention
from keras_nlp_cache.surgery.positionwise import check_layer
from keras_nlp_cache.surgery.rewiring import backbone_of
from keras_nlp_cache.surgery.rewiring import EditError
from keras_nlp_cache.surgery.rewiring import rewire_sites
from keras_nlp_cache.surgery.selection import select_blocks

PROJECTIONS = tuple(CachedAttention.projections)


def replace_projections(model, where, projections, layer):
    """Replaces projections of the attention layers of decoder blocks.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        projections: `"query"`, `"key"`, `"value"` or `"output"`, or a list of
            these.
        layer: Function that takes the projection and returns the layer to put
            in its place, which may call the projection. The first three
            project `(B, T, hidden_dim)` to `(B, T, heads, head_dim)`, the last
            projects `(B, T, query_heads, head_dim)` to `(B, T, hidden_dim)`.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If something else than decoder blocks is selected, a
            projection is unknown, or the layer does not fit or mixes positions.

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

    def changes(attention, hidden_states):
        heads = attention.compute_query_shape(hidden_states.shape)
        found = {}
        for name in projections:
            attribute = attention.projections[name]
            old = getattr(attention, attribute)
            shape = heads if name == "output" else hidden_states.shape
            new = layer(old)
            _check_projection(new, old, name, shape)
            found[attribute] = new
        return found

    return edit_attention(model, where, changes)


def replace_attention(model, where, function):
    """Replaces how the attention layers of decoder blocks attend.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        function: Function that takes the attention layer and returns a layer
            to be called as `keras_nlp_cache.attention.attend()` is, with the
            arguments `query`, `key`, `value`, `mask`, `scale`, `soft_cap` and
            `dropout`. It is called with and without a cache.

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

    def changes(attention, hidden_states):
        new = function(attention)
        if not isinstance(new, keras.layers.Layer):
            raise EditError(
                "Expected `function` to return a Keras layer that is called "
                f"as `attend()` is. Received: {new!r}."
            )
        _check_attention(new, attention, hidden_states)
        return {"replaced_attention": new}

    return edit_attention(model, where, changes)


def add_lora(model, where, rank, projections=("query", "value"), alpha=None):
    """Puts trainable low-rank adapters on projections.

    The original weights are left as they are, trainable or not; to train the
    adapters alone, set `trainable` of what else is not to be trained.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which decoder blocks. See `select()`.
        rank: int. The rank of the adapters.
        projections: Which projections. See `replace_projections()`.
        alpha: Optional float. The adapters are scaled by `alpha / rank`.

    Returns:
        A model of the same class, with the outputs of `model` until its
        adapters are trained.

    Example:
    ```python
    adapted = surgery.add_lora(backbone, slice(None), rank=4)
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
            dtype=projection.dtype_policy,
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

    def changes(attention, hidden_states):
        shape = attention.compute_query_shape(hidden_states.shape)
        if not heads or not all(-shape[2] <= i < shape[2] for i in heads):
            raise EditError(
                f"Expected `heads` to be some of the {shape[2]} heads of "
                f"attention layer {attention.name!r}. Received: {heads}."
            )
        scale = [1.0] * shape[2]
        for i in heads:
            scale[i] = 0.0
        attribute = attention.projections["output"]
        old = getattr(attention, attribute)
        new = ScaledHeads(
            old, scale, dtype=old.dtype_policy, name=f"{old.name}_heads"
        )
        _check_projection(new, old, "output", shape)
        return {attribute: new}

    return edit_attention(model, where, changes)


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
            dtype=attention.dtype_policy,
            name=f"{attention.name}_sink",
        ),
    )


def edit_attention(model, where, changes):
    """Gives decoder blocks attention layers with other parts.

    Args:
        model: A backbone or a `CausalLM`.
        where: Which decoder blocks. See `select()`.
        changes: Function that takes an attention layer and the symbolic hidden
            states that its block takes, and returns a dictionary from
            attributes to the layers that they are to hold.
    """
    chosen = select_blocks(model, where)
    everywhere = backbone_of(model).sites
    names = {site.layer.name for site in everywhere}
    edited = {}

    def edit(block, hidden_states):
        attention = getattr(block, block.attention_name)
        attention = share(attention, **changes(attention, hidden_states))
        name = block.name
        if any(x.layer is block and x not in chosen for x in everywhere):
            # The block as it was is in the graph, too.
            while name in names:
                name += "_edited"
            names.add(name)
        return share(block, name=name, **{block.attention_name: attention})

    def call(site, *args, **kwargs):
        block = site.layer
        if site in chosen:
            if id(block) not in edited:
                edited[id(block)] = edit(block, args[0])
            block = edited[id(block)]
        return block(*args, **kwargs)

    return rewire_sites(model, call)


def _check_projection(new, old, name, shape):
    expected = tuple(old.compute_output_shape(shape))
    if not isinstance(new, keras.layers.Layer):
        raise EditError(
            f"Expected a Keras layer in place of the {name} projection. "
            f"Received: {new!r}."
        )
    try:
        received = tuple(new(keras.KerasTensor(shape, new.compute_dtype)).shape)
    except Exception as e:
        received = f"{type(e).__name__}: {e}"
    if received != expected:
        raise EditError(
            f"Expected layer {new.name!r}, in place of the {name} projection, "
            f"to turn inputs of shape {tuple(shape)} into outputs of shape "
            f"{expected}. Received: {received}."
        )
    check_layer(new, shape)


def _check_attention(new, attention, hidden_states):
    query_heads = attention.compute_query_shape(hidden_states.shape)[2]
    heads, head_dim = attention.key_value_shape
    shape = (None, None, query_heads, head_dim)
    cache = keras.KerasTensor((None, heads, None, head_dim), new.compute_dtype)
    try:
        received = new(
            query=keras.KerasTensor(shape, new.compute_dtype),
            key=cache,
            value=cache,
            mask=keras.KerasTensor((None, 1, None, None)),
            scale=attention.scale,
            soft_cap=attention.soft_cap,
            dropout=None,
        ).shape
    except Exception as e:
        received = f"{type(e).__name__}: {e}"
    if received != shape:
        raise EditError(
            f"Expected the attention function {new.name!r} to turn queries of "
            f"shape {shape} and keys and values of shape {cache.shape} into an "
            f"output of shape {shape}. Received: {received}."
        )
    check_attention(new, query_heads, heads, head_dim)
