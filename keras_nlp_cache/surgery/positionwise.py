"""Whether a graph can be run a few positions at a time.

A cache remembers keys and values. A layer that looks at other positions
without one, a convolution over the text or an attention layer of its own, gives
something else when tokens come one by one than when they come together. Such a
model would train as edited and generate as something else, so it is refused.

Of some layers we know that they treat each position alone, by what they are.
All others are run on a long text: as a whole, and with each position as a text
of its own. A gradient then shows what the rounding of numbers may hide.
"""

import inspect
import math

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.blocks.decoder_block import DecoderBlock
from keras_nlp_cache.blocks.encoder_block import hidden_states_alone
from keras_nlp_cache.cache.masks import causal_mask
from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.layers.block_call import first_argument
from keras_nlp_cache.surgery.adapters import AttentionSink
from keras_nlp_cache.surgery.adapters import LowRankAdapter
from keras_nlp_cache.surgery.adapters import ScaledHeads

# Longer than windows and strides are, and a multiple of none.
_LENGTH = 1031
# Some layers do something else for a text that is shorter than their window.
_SHORT = 5
# Numbers in one tensor, for what is very wide to be run on a shorter text.
_NUMBERS = 2**24


class Positionwise:
    """Mixin for layers that are known to treat each position alone.

    They are not run to find out, and may ask for more than what is run here
    has, such as a certain number of rows.
    """


def check_positionwise(edited, original):
    """Checks what an edit inserted.

    Decoder blocks, which have a cache, are passed over, and so is all that is
    in an encoder, which sees a text at once. Inserted layers run on
    random weights, since those they have may be zeros that hide what they do.

    Args:
        edited: A backbone.
        original: The backbone that it was made from.

    Raises:
        ValueError: If an inserted layer mixes positions.
    """
    known = {id(site.layer) for site in original.sites}
    sites = edited.sites
    inserted = [
        site
        for site in sites
        if id(site.layer) not in known
        and site.block is None
        and not site.in_encoder
    ]
    if all(_is_positionwise(site.layer) for site in inserted):
        return
    width = next(site.shape[-1] for site in sites if site.block is not None)
    length = min(_long(width), edited.max_positions or _LENGTH)
    rng = np.random.default_rng(0)
    vocabulary = edited.token_embedding.input_dim
    token_ids = rng.integers(0, vocabulary, length).astype("int32")
    results = range(len(sites))
    # What happens in between, a transposition and back, say, is nobody's
    # business. The last are the outputs of the graph, where a normalization
    # may hide what the blocks have seen.
    outputs = [
        *_blocks_after(inserted, sites),
        *range(len(sites), len(sites) + 1 + len(edited.taps)),
    ]

    def mixed(kept):
        def run(noise, positions):
            return _run(
                edited, ops.take(token_ids, positions), noise, positions, kept
            )

        return _mixed(run, rng.normal(size=(length, width)))

    layers = [site.layer for site in inserted]
    with keras.StatelessScope(state_mapping=_random_weights(layers)):
        try:
            if not mixed(outputs):
                return
            culprits = [
                site
                for i, site in zip(results, sites)
                if site in inserted
                and not _is_positionwise(site.layer)
                and len(site.shape) >= 3
                and mixed([i])
            ]
        except Exception as e:
            raise ValueError(
                "Expected the inserted layers, "
                f"{[site.name for site in inserted]}, to take hidden states "
                f"of any length. Received {type(e).__name__}: {e}"
            ) from e
    culprit = (culprits or inserted)[0]
    raise ValueError(_mixes_positions(culprit.layer, culprit.name))


def _blocks_after(inserted, sites):
    """Indices of the calls of blocks that come right after others."""
    found, inserted_before = [], False
    for i, site in enumerate(sites):
        if site.block is None:
            inserted_before |= site in inserted
        elif inserted_before:
            found.append(i)
            inserted_before = False
    return found


def check_layer(layer, shape):
    """Checks a layer that is called inside a decoder block.

    Args:
        layer: A built layer.
        shape: What it takes, `(batch, positions, ...)`. Only what follows the
            first two dimensions counts.

    Raises:
        ValueError: If it mixes positions.
    """
    if _is_positionwise(layer):
        return
    shape = shape[2:]
    x = np.random.default_rng(0).normal(size=(_long(math.prod(shape)), *shape))
    dtype = layer.compute_dtype or keras.config.floatx()

    def run(x, positions):
        return [layer(ops.cast(x, dtype))]

    with keras.StatelessScope(state_mapping=_random_weights([layer])):
        try:
            mixes = _mixed(run, x)
        except Exception as e:
            raise ValueError(
                f"Expected layer {layer.name!r} to take hidden states of any "
                f"length. Received {type(e).__name__}: {e}"
            ) from e
    if mixes:
        raise ValueError(_mixes_positions(layer, layer.name))


def check_attention(
    function, query_heads, key_value_heads, head_dim, further=()
):
    """Checks a layer that stands in for `attend()`.

    Args:
        function: A built layer that takes the arguments of `attend()`.
        query_heads: int.
        key_value_heads: int.
        head_dim: int.
        further: Which of `"sink"` and `"bias"` the layer is called with.

    Raises:
        ValueError: If what it returns for one query depends on the others, or
            on slots that the mask hides.
    """
    if type(function) is AttentionSink:
        return
    rng = np.random.default_rng(0)
    # There are as many logits as pairs of positions.
    length = min(_LENGTH, math.isqrt(_NUMBERS // query_heads))

    def tensor(*shape):
        return ops.cast(rng.normal(size=shape), function.compute_dtype)

    # One slot more than tokens, as in a cache that is not yet full.
    key = tensor(1, key_value_heads, length + 1, head_dim)
    value = tensor(1, key_value_heads, length + 1, head_dim)
    query = rng.normal(size=(length, query_heads, head_dim))
    sink = ops.cast(rng.normal(size=query_heads), "float32")
    slope = ops.cast(rng.uniform(size=(query_heads, 1, 1)), "float32")

    def run(query, positions):
        rows, count = positions.shape
        # A query that is alone sees a slot more, but for what the mask hides.
        slots = length + 1 if count == 1 else count
        mask = causal_mask(np.arange(length)[:, None] - np.arange(slots))
        mask = ops.take(mask, ops.reshape(positions, (-1,)), axis=0)
        distance = positions[:, None, :, None] - np.arange(slots)
        values = {"sink": sink, "bias": -slope * ops.cast(distance, "float32")}
        return [
            function(
                query=ops.cast(query, function.compute_dtype),
                key=ops.repeat(key[:, :, :slots], rows, axis=0),
                value=ops.repeat(value[:, :, :slots], rows, axis=0),
                mask=ops.reshape(mask, (rows, 1, count, slots)),
                scale=head_dim**-0.5,
                soft_cap=None,
                dropout=None,
                **{name: values[name] for name in further},
            )
        ]

    # All keys for each query would be too many.
    some = np.unique(np.append(rng.choice(length, 6), [0, 1, length - 1]))
    with keras.StatelessScope(state_mapping=_random_weights([function])):
        mixes = _mixed(run, query, some)
    if mixes:
        raise ValueError(
            f"Expected the attention function {function.name!r} to treat each "
            "query alone and to see no slot that `mask` hides. Received a "
            f"layer of type {type(function).__name__} which gives something "
            f"else for {length} queries at once than for one at a time with "
            "a hidden slot more."
        )


def _long(width):
    return max(min(_LENGTH, _NUMBERS // width), _SHORT + 1)


# === What is known of a layer by what it is ===


def _is_positionwise(layer):
    """Whether a layer is known to treat each position alone."""
    if isinstance(layer, Positionwise):
        return True
    if type(layer) in (LowRankAdapter, ScaledHeads):
        return _is_positionwise(layer.projection)
    if is_exactly(layer, keras.layers.EinsumDense):
        inputs, kernel, output = layer.equation.replace("->", ",").split(",")
        first = inputs[:2]
        return (
            first.isalpha()
            and output.startswith(first)
            and not set(first) & set(kernel + (layer.bias_axes or ""))
            and _is_of_keras(layer.activation)
        )
    if type(layer) is keras.layers.Activation or is_exactly(
        layer, keras.layers.Dense
    ):
        return _is_of_keras(layer.activation)
    return type(layer) in (keras.layers.Dropout, keras.layers.Identity)


def _is_of_keras(activation):
    # They are elementwise, or go along the last axis.
    return activation is None or (
        inspect.isfunction(activation)
        and activation.__module__.startswith("keras.src.activations.")
    )


def _mixes_positions(layer, name):
    return (
        f"Expected the inserted layer {name!r} to treat each position alone, "
        "since it has no cache to remember others in. Received a layer of "
        f"type {type(layer).__name__} which returns something else for one "
        "position of a text than for the same position alone, or depends on "
        f"other positions or other rows of a batch.{_hint(layer)}"
    )


def _hint(layer):
    if not isinstance(layer, keras.layers.Layer):
        return ""
    for inner in layer._flatten_layers():
        if isinstance(inner, DecoderBlock):
            return (
                f" It calls the decoder block {inner.name!r} inside. Call the "
                "block in the graph itself, where it gets its cache."
            )
    for inner in layer._flatten_layers():
        kind = _kind(inner)
        if kind is not None:
            which = "" if inner is layer else f" It has {inner.name!r} inside."
            return f"{which} {kind}"
    return (
        " Attention over the text belongs into a decoder block of this package,"
        " such as `type(backbone.blocks[0])`."
    )


def _kind(layer):
    """What it is about a layer of Keras that mixes positions."""
    size = getattr(layer, "kernel_size", (1,))
    layers = keras.layers
    if max(size) > 1:
        return (
            f"A {type(layer).__name__} with `kernel_size={tuple(size)}` looks "
            "at neighbours; with 1 it does not."
        )
    if isinstance(layer, layers.RNN | layers.Bidirectional):
        return f"A {type(layer).__name__} remembers the positions before."
    if hasattr(layer, "pool_size") or "Pooling" in type(layer).__name__:
        return f"A {type(layer).__name__} pools over positions."
    if isinstance(layer, layers.Permute | layers.Flatten | layers.Reshape):
        return f"A {type(layer).__name__} moves positions."
    return None


# === How it shows ===


def _mixed(run, x, some=None):
    """Whether positions are mixed, in any of several results.

    Args:
        run: Function from `(B, T, ...)` and int positions `(B, T)` to a list
            of results `(B, T, ...)`.
        x: float array `(L, ...)`, something else for each position.
        some: Optional int array. The positions to run alone. Defaults to all.
    """
    x = x.astype("float32")
    positions = np.arange(len(x), dtype="int32")
    some = positions if some is None else some.astype("int32")
    alone = [y[:, 0] for y in run(x[some][:, None], some[:, None])]
    for length in (min(_SHORT, len(x)), len(x)):
        here = some[some < length]
        whole = run(x[None, :length], positions[None, :length])
        for y, z in zip(whole, alone):
            # A stride or a sum has changed the shape of the whole.
            if y.shape[1] != length or y.shape[2:] != z.shape[1:]:
                return True
            if not _agree(ops.take(y[0], here, axis=0), z[: len(here)]):
                return True
    return _leaks(run, x)


def _leaks(run, x):
    """Whether results at some positions depend on the input at others.

    However little: what does not depend on it has a gradient of zero.
    """
    rng = np.random.default_rng(1)
    seen = rng.permutation(len(x)) % 2 == 0
    positions = np.arange(len(x), dtype="int32")[None]
    for chosen in (seen, ~seen):

        def total(x, chosen=chosen):
            kept = np.flatnonzero(chosen)
            sums = []
            for y in run(x, positions):
                y = ops.take(ops.cast(y[0], "float32"), kept, axis=0)
                weights = rng.normal(size=y.shape).astype("float32")
                sums.append(ops.sum(ops.multiply(y, weights)))
            return sum(sums)

        try:
            gradient = _gradient(total, x[None])
        except Exception:
            # Not all that runs has one. What it shows comes on top.
            return False
        if gradient is None or not np.isfinite(gradient).all():
            continue
        gradient = np.abs(gradient[0]).reshape(len(x), -1).max(axis=1)
        # Rounding does not leak. The smallest numbers may be noise anyway.
        if gradient[~chosen].max() > 1e-12 * gradient.max():
            return True
    return False


def _gradient(function, x):
    """The gradient of a scalar, or `None` if it does not depend on `x`."""
    if keras.config.backend() == "torch":
        import torch

        with torch.enable_grad():
            x = ops.convert_to_tensor(x).detach().requires_grad_(True)
            y = function(x)
            if not y.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(y, x, allow_unused=True)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        gradient = tape.gradient(y, x)
    else:
        import jax

        gradient = jax.grad(function)(ops.convert_to_tensor(x))
    return None if gradient is None else ops.convert_to_numpy(gradient)


def _random_weights(layers):
    rng = np.random.default_rng(0)
    variables = {
        id(v): v
        for layer in layers
        if isinstance(layer, keras.layers.Layer)
        for v in layer.variables
        if keras.backend.is_float_dtype(v.dtype)
    }

    def value(v):
        if len(v.shape) < 2:  # It may be a variance.
            return rng.uniform(0.1, 1.0, v.shape)
        # Large enough to be seen, and small enough for many in a row.
        return rng.normal(size=v.shape) * math.prod(v.shape) ** -0.25

    return [
        (v, ops.convert_to_tensor(value(v), v.dtype))
        for v in variables.values()
    ]


def _run(model, token_ids, noise, positions, kept):
    """Results of calls in the graph, followed by the graph's own outputs.

    Args:
        model: A backbone.
        token_ids: int `(B, T)`.
        noise: float `(B, T, hidden_dim)`, added to the embedded tokens, which
            are as few as the vocabulary is small.
        positions: int `(B, T)`.
        kept: Which of them, counted as calls, then outputs.

    Returns:
        List of tensors.
    """
    results = {}
    sites = model.sites
    # Not all are called: of a tower of images, nothing is.
    places = {site.name: i for i, site in enumerate(sites)}

    def call(site, *args, **kwargs):
        nonlocal noise
        if not site.is_block and not isinstance(site.layer, Positionwise):
            x = hidden_states_alone(site.layer(*args, **kwargs))
        else:
            x = first_argument(args, kwargs)
        if x is None:
            return x  # Without images.
        if noise is not None and tuple(x.shape) == tuple(noise.shape):
            if not site.in_encoder:
                x = x + ops.cast(noise, x.dtype)
                noise = None
        if places[site.name] in kept:
            results[places[site.name]] = batch_first(x, site.shape)
        return x

    inputs = dict.fromkeys(model._inputs_struct)
    inputs["cache"] = [None] * len(model.cache_spec) * 2
    roles = model.roles
    inputs[roles.token_ids] = ops.convert_to_tensor(token_ids, dtype="int32")
    # For what is called on it not to be left out.
    inputs[roles.padding_mask] = ops.ones(positions.shape, "int32")
    if roles.source_ids is not None:
        inputs |= model.anything_to_read(len(positions))
    positions = ops.convert_to_tensor(positions, dtype="int32")
    x, taps = model.replay(inputs, positions, call)
    x = model.hidden_states_of(x)
    of_encoder = {site.name for site in sites if site.in_encoder}
    shapes = {name: y.shape for name, y in model._outputs_struct[2].items()}
    taps = {
        k: x if k in of_encoder else batch_first(y, shapes[k])
        for k, y in taps.items()
    }
    for i, output in enumerate((x, *taps.values()), start=len(sites)):
        if i in kept:
            results[i] = output
    return [results[i] for i in kept]


def batch_first(x, shape):
    """The same with the axes of batch and positions first.

    Some blocks take and return several streams, whose number comes before.

    Args:
        x: Tensor of hidden states.
        shape: What is known of its shape: no size of the batch, nor before it
            one that is not known.
    """
    before = tuple(shape).index(None) if None in tuple(shape) else 0
    for _ in range(before):
        x = ops.moveaxis(x, 0, 2)
    return x


def _agree(x, y):
    """Whether two results are the same but for rounding."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    tolerance = 1e-3 if dtype in ("float32", "float64") else 0.05
    x, y = (ops.convert_to_numpy(ops.cast(z, "float32")) for z in (x, y))
    scale = np.nanmax(np.abs(x), initial=1e-6)
    return np.allclose(x, y, rtol=0, atol=tolerance * scale, equal_nan=True)
