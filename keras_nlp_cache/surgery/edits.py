"""The edits that people make, each a few lines on `rewire()`."""

import inspect

import keras

from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import hidden_states_alone
from keras_nlp_cache.drop_in import stand_in
from keras_nlp_cache.graph.sites import Site
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.layers.specializing import specialize
from keras_nlp_cache.surgery import part_edits
from keras_nlp_cache.surgery.newcomers import Newcomers
from keras_nlp_cache.surgery.parts import EditedBlocks
from keras_nlp_cache.surgery.rewiring import backbone_of
from keras_nlp_cache.surgery.rewiring import EditError
from keras_nlp_cache.surgery.rewiring import rewire_sites
from keras_nlp_cache.surgery.selection import select
from keras_nlp_cache.surgery.selection import select_blocks


def insert_after(model, where, layer):
    """Inserts a layer after others.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: What to insert it after. See `select()`. After `residual` of a
            block, what the layer returns is the residual stream from there on.
        layer: A layer that takes hidden states `(B, T, hidden_dim)`, or what
            else the selected layer returns, and returns the same shape.
            Selected several times, the same layer is called each time. For a
            layer for each, pass a function that takes the selected layer and
            returns the one to insert. A decoder block gets a cache. A layer of
            another model is shared with it, unless its name is taken here: then
            it comes under another one, as a copy with weights of its own, since
            a weight has one path.

    Returns:
        A model of the same class that shares layers and weights with `model`.

    Raises:
        ValueError: If nothing is selected, the layer does not fit, or it mixes
            positions and is no decoder block.

    Example:
    ```python
    adapter = lambda block: keras.layers.Dense(
        32, kernel_initializer="identity", name=f"{block.name}_adapter"
    )
    edited = surgery.insert_after(backbone, slice(None), adapter)

    # Blocks of another model, one after the other (a passthrough merge).
    other = type(backbone).from_config(backbone.get_config())
    for block in other.blocks:
        edited = surgery.insert_after(edited, -1, block)
    ```

    Reference:
        https://github.com/keras-team/keras-hub/pull/1598
    """
    chosen = select(model, where)
    inserted = _layers(layer, Newcomers(backbone_of(model)))
    blocks = EditedBlocks(model, chosen, part_edits.insert_after(inserted))

    def call(site, *args, **kwargs):
        x = hidden_states_alone(blocks.layer(site)(*args, **kwargs))
        if site in chosen:
            x = _call(inserted(site), (x,), {}, x.shape)
        return x

    return rewire_sites(model, call)


def insert_before(model, where, layer):
    """Inserts a layer before others.

    Takes the arguments of `insert_after()`. What is selected then gets what
    the layer made of its first input; a branch of a block, what the layer made
    of its normalized input.
    """
    chosen = select(model, where)
    inserted = _layers(layer, Newcomers(backbone_of(model)))
    blocks = EditedBlocks(model, chosen, part_edits.insert_before(inserted))

    def call(site, *args, **kwargs):
        if site in chosen:
            x = first_argument(args, kwargs)
            x = _call(inserted(site), (x,), {}, x.shape)
            args, kwargs = _with_first_argument(x, args, kwargs)
        return blocks.layer(site)(*args, **kwargs)

    return rewire_sites(model, call)


def replace(model, where, layer):
    """Puts a layer in the place of others.

    Takes the arguments of `insert_after()`. The layer is called with the
    arguments of the one it replaces, as far as it takes them. A decoder block
    brings its own cache, any other layer in its place needs none. Attributes
    of the backbone that held the replaced layer (`token_embedding`, say) hold
    the new one.

    In the place of a branch of a block, `attention` or `feedforward`, a layer
    gets the normalized hidden states, and what it returns is added. In the
    place of `residual` it gets what attention returns, and nothing is added.
    A block whose attention is replaced keeps its place in the cache.

    Example:
    ```python
    identity = keras.layers.Identity(name="nothing")
    edited = surgery.replace(backbone, 1, identity)
    len(edited.make_cache(1, 8))  # One less than before.
    ```
    """
    chosen = select(model, where)
    replacement = _layers(layer, Newcomers(backbone_of(model), chosen))
    blocks = EditedBlocks(model, chosen, part_edits.replace(replacement))
    replaced = {}  # Filled while the graph grows, read when it is complete.

    def call(site, *args, **kwargs):
        if site not in chosen:
            return blocks.layer(site)(*args, **kwargs)
        new = replacement(site)
        replaced[id(site.layer)] = new
        return _call(new, args, kwargs, site.shape)

    return rewire_sites(model, call, replaced=replaced)


def remove(model, where):
    """Takes layers out of a model. Their inputs pass in their place.

    Inside a block, `attention` or `feedforward` then add nothing, and without
    `residual` attention's result goes on alone. A block without attention
    keeps its place in the cache.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: What to remove. See `select()`.

    Returns:
        A model of the same class, with one cache less for each decoder block
        that was removed.

    Raises:
        ValueError: If nothing is selected, or a layer is to be removed that
            turns its input into something of another shape.

    Example:
    ```python
    shallow = surgery.remove(backbone, -1)
    ```
    """
    chosen = select(model, where)
    blocks = EditedBlocks(model, chosen, part_edits.remove)

    def call(site, *args, **kwargs):
        if site in chosen:
            return first_argument(args, kwargs)
        return blocks.layer(site)(*args, **kwargs)

    return rewire_sites(model, call)


def keep_blocks(model, where):
    """Removes all decoder blocks but some, or all of the encoder.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which blocks to keep. See `select()`. `slice(0, 12)` exits after
            the first twelve, `slice(None, None, 2)` prunes every other one.
            With `"encoder.*[02468]"`, the decoder stays as it is.

    Returns:
        A model of the same class. The final norm stays in its place.

    Example:
    ```python
    early_exit = surgery.keep_blocks(backbone, slice(0, 1))
    ```
    """
    kept = select_blocks(model, where, of_encoder=True)
    sides = {site.encoder_block is None for site in kept}
    others = [
        site
        for site in backbone_of(model).sites
        if site.is_block
        and (site.encoder_block is None) in sides
        and site not in kept
    ]
    if not others:
        return rewire_sites(model, Site.__call__)
    return remove(model, others)


def repeat_blocks(model, where, times=2):
    """Runs blocks several times (depth up-scaling).

    Blocks that follow each other are repeated as a run: of four blocks,
    `slice(1, 3)` gives 0, 1, 2, 1, 2, 3. Every call has its own cache and
    shares its weights. Only blocks are repeated, not what was inserted
    between them.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
        where: Which blocks to repeat. See `select()`.
        times: int. How often to run them in all.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If something else than blocks is selected, or `times` is not
            a positive integer.

    Example:
    ```python
    deep = surgery.repeat_blocks(backbone, slice(0, 2))
    len(deep.make_cache(1, 8))  # 4 for a backbone of 2 blocks.
    ```

    Reference:
        SOLAR, https://arxiv.org/abs/2312.15166
    """
    if isinstance(times, bool) or not hasattr(times, "__index__") or times < 1:
        raise ValueError(
            f"Expected `times` to be a positive integer. Received: {times!r}."
        )
    runs = []
    for site in select_blocks(model, where, of_encoder=True):
        if runs and _follows(site, runs[-1][-1]):
            runs[-1].append(site)
        else:
            runs.append([site])
    again = {run[-1]: run for run in runs}
    arguments = {}

    def call(site, *args, **kwargs):
        x = site.layer(*args, **kwargs)
        # What blocks hand on comes of those that were called since.
        carried = getattr(site.layer, "carries", ())
        arguments[site] = {k: y for k, y in kwargs.items() if k not in carried}
        for _ in range(times - 1):
            for repeated in again.get(site, ()):
                x = repeated.layer(x, **arguments[repeated])
        return x

    return rewire_sites(model, call)


def _follows(site, before):
    """Whether the call of a block comes right after that of another."""
    if site.encoder_block is None:
        return before.block is not None and before.block == site.block - 1
    return before.encoder_block == site.encoder_block - 1


def tap(model, where):
    """Makes a backbone return what some of its layers return.

    A tapped backbone returns its taps last: `(hidden_states, taps)`, and with
    a cache `(hidden_states, cache, taps)`. `taps` is a dictionary from names
    of sites to tensors. A tap shows what the next layer gets to see, so what
    is later inserted after a tapped layer shows in its tap.

    `keras.Model(backbone.input, layer.output)` shows the same of a backbone
    that was not edited. Of one that was, it can take layers that the edit
    inserted, and refuses those that are the original's too, whose `output` is
    what they return there.

    Args:
        model: A backbone or a `CausalLM` of this package. It is left as it is.
            Of a `CausalLM`, the `backbone` returns the taps; the task itself
            returns logits and generates as before.
        where: What to tap. See `select()`. `"block.*.attention.weights"` are
            float32 `(B, query_heads, T, S)`, where `S` is the cache's length
            or, without one, `T`.

    Returns:
        A model of the same class.

    Example:
    ```python
    tapped = surgery.tap(backbone, [slice(None), "block.0.attention.weights"])
    hidden_states, taps = tapped({"token_ids": [[1, 2, 3]]})
    hidden_states, cache, taps = tapped({
        "token_ids": [[1, 2, 3]],
        "cache": tapped.make_cache(1, 8),
        "cache_update_index": 0,
    })
    ```
    """
    chosen = select(model, where)
    blocks = EditedBlocks(model, chosen, part_edits.tap)

    def call(site, *args, **kwargs):
        return blocks.layer(site)(*args, **kwargs)

    return rewire_sites(model, call, tapped=chosen)


def _layers(layer, newcomers):
    """A function from a site to the layer to insert there."""
    if isinstance(layer, keras.Operation):
        return lambda site: newcomers(layer)
    if callable(layer) and not isinstance(layer, type):
        return lambda site: newcomers(_checked_layer(layer(site.layer)))
    return lambda site: _checked_layer(layer)


def _checked_layer(layer):
    if isinstance(layer, keras.Operation):
        return layer
    raise EditError(
        "Expected `layer` to be a Keras layer, or a function that takes the "
        f"selected layer and returns one. Received: {layer!r} of type "
        f"{type(layer).__name__}."
    )


def _call(layer, args, kwargs, shape):
    """Calls a layer in the graph, and explains it if that goes wrong."""
    x = first_argument(args, kwargs)
    try:
        _adopt(layer, x)
        y = layer(*args, **_accepted(layer, kwargs))
    except Exception as e:
        raise EditError(
            f"Expected layer {layer.name!r} to take inputs of shape {x.shape} "
            f"and to return outputs of shape {shape}. Received "
            f"{type(e).__name__}: {e}"
        ) from e
    if getattr(y, "shape", None) != shape:
        raise EditError(
            f"Expected layer {layer.name!r} to turn inputs of shape {x.shape} "
            f"into outputs of shape {shape}. Received outputs of shape "
            f"{getattr(y, 'shape', None)}."
        )
    return y


def _adopt(layer, x):
    """Gives one of upstream's decoder blocks the class that takes a cache."""
    cls = stand_in(type(layer))
    if cls is not None and issubclass(cls, DecoderBlock):
        if not layer.built:
            layer.build(x.shape)
        specialize(layer, cls)


def _accepted(layer, kwargs):
    """Those of the keyword arguments that a layer takes."""
    if isinstance(layer, DecoderBlock):
        return kwargs
    parameters = inspect.signature(layer.call).parameters.values()
    if any(x.kind is x.VAR_KEYWORD for x in parameters):
        return kwargs
    names = {x.name for x in parameters}
    return {name: value for name, value in kwargs.items() if name in names}


def _with_first_argument(x, args, kwargs):
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}
