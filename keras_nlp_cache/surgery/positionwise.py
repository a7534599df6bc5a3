"""Whether a graph can be run a few positions at a time.

A cache remembers keys and values. A layer that looks at other positions
without one, a convolution over the text or an attention layer of its own, gives
something else when tokens come one by one than when they come together. Such a
model would train as edited and generate as something else, so it is refused.
"""

import keras
import numpy as np
from keras import ops

from keras_nlp_cache.cache import causal_mask
from keras_nlp_cache.cache import slots
from keras_nlp_cache.cached_block import first_argument
from keras_nlp_cache.decoder_block import DecoderBlock

_LENGTH = 4


class Positionwise:
    """Mixin for layers that are known to treat each position alone.

    They are not run to find out, and may ask for more than what is run here
    has, such as a certain number of rows.
    """


def check_positionwise(edited, original):
    """Checks what an edit inserted, by running it in both ways.

    Decoder blocks, which have a cache, are passed over. Inserted layers run on
    random weights, since those they have may be zeros that hide what they do.

    Args:
        edited: A backbone.
        original: The backbone that it was made from.

    Raises:
        ValueError: If an inserted layer mixes positions.
    """
    known = {id(site.layer) for site in original.sites}
    inserted = [
        site
        for site in edited.sites
        if id(site.layer) not in known and site.block is None
    ]
    if not inserted:
        return
    layers = [site.layer for site in inserted]
    token_ids = np.arange(_LENGTH)[None, :] % edited.token_embedding.input_dim
    with keras.StatelessScope(state_mapping=_random_weights(layers)):
        try:
            whole = _run(edited, token_ids, 0)
            steps = [
                _run(edited, token_ids[:, i : i + 1], i) for i in range(_LENGTH)
            ]
        except Exception as e:
            raise ValueError(
                "Expected the inserted layers, "
                f"{[site.name for site in inserted]}, to take hidden states "
                f"of any length. Received {type(e).__name__}: {e}"
            ) from e
    results = list(zip(whole, *steps))
    # The last are the outputs of the graph. What happens in between, a
    # transposition and back, say, is nobody's business.
    outputs = 1 + len(edited.taps)
    if all(_agree(*result) for result in results[-outputs:]):
        return
    culprit = next(
        (
            site
            for site, result in zip(edited.sites, results)
            if site in inserted
            and len(result[0].shape) == 3
            and not _agree(*result)
        ),
        inserted[0],
    )
    raise ValueError(_mixes_positions(culprit.layer, culprit.name))


def check_layer(layer, shape):
    """Checks a layer that is called inside a decoder block.

    Args:
        layer: A built layer.
        shape: What it takes, `(batch, positions, ...)`. Only what follows the
            first two dimensions counts.

    Raises:
        ValueError: If it mixes positions.
    """
    x = np.random.default_rng(0).normal(size=(1, _LENGTH, *shape[2:]))
    x = ops.convert_to_tensor(x, dtype=layer.compute_dtype)
    with keras.StatelessScope(state_mapping=_random_weights([layer])):
        whole = layer(x)
        steps = [layer(x[:, i : i + 1]) for i in range(_LENGTH)]
    if not _agree(whole, *steps):
        raise ValueError(_mixes_positions(layer, layer.name))


def check_attention(function, query_heads, key_value_heads, head_dim):
    """Checks a layer that stands in for `attend()`.

    Args:
        function: A built layer that takes the arguments of `attend()`.
        query_heads: int.
        key_value_heads: int.
        head_dim: int.

    Raises:
        ValueError: If what it returns for one query depends on the others, or
            on slots that the mask hides.
    """
    rng = np.random.default_rng(0)

    def tensor(*shape):
        x = rng.normal(size=shape)
        return ops.convert_to_tensor(x, dtype=function.compute_dtype)

    # One slot more than tokens, as in a cache that is not yet full.
    key = tensor(1, key_value_heads, _LENGTH + 1, head_dim)
    value = tensor(1, key_value_heads, _LENGTH + 1, head_dim)
    query = tensor(1, _LENGTH, query_heads, head_dim)

    def run(first, length, max_length):
        return function(
            query=query[:, first : first + length],
            key=key[:, :, :max_length],
            value=value[:, :, :max_length],
            mask=causal_mask(first, length, max_length)[None, None],
            scale=head_dim**-0.5,
            soft_cap=None,
            dropout=None,
        )

    with keras.StatelessScope(state_mapping=_random_weights([function])):
        whole = run(0, _LENGTH, _LENGTH)
        steps = [run(i, 1, _LENGTH + 1) for i in range(_LENGTH)]
    if not _agree(whole, *steps):
        raise ValueError(
            f"Expected the attention function {function.name!r} to treat each "
            "query alone and to see no slot that `mask` hides. Received a "
            f"layer of type {type(function).__name__} which gives something "
            f"else for {_LENGTH} queries at once than for one at a time with "
            "a hidden slot more."
        )


def _mixes_positions(layer, name):
    return (
        f"Expected the inserted layer {name!r} to treat each position alone, "
        "since it has no cache to remember others in. Received a layer of "
        f"type {type(layer).__name__} which, called on one position at a time, "
        f"returns something else than on {_LENGTH} at once.{_hint(layer)}"
    )


def _hint(layer):
    if not isinstance(layer, keras.layers.Layer):
        return ""
    for inner in layer._flatten_layers(include_self=False):
        if isinstance(inner, DecoderBlock):
            return (
                f" It calls the decoder block {inner.name!r} inside. Call the "
                "block in the graph itself, where it gets its cache."
            )
    return (
        " Attention over the text belongs into a decoder block of this package,"
        " such as `type(backbone.blocks[0])`."
    )


def _random_weights(layers):
    rng = np.random.default_rng(0)
    variables = {
        id(v): v
        for layer in layers
        if isinstance(layer, keras.layers.Layer)
        for v in layer.variables
        if keras.backend.is_float_dtype(v.dtype)
    }
    return [
        (v, ops.convert_to_tensor(rng.uniform(0.1, 1.0, v.shape), v.dtype))
        for v in variables.values()
    ]


def _run(model, token_ids, index):
    """The result of each call in the graph, and the graph's own outputs."""
    results = []

    def call(site, *args, **kwargs):
        if site.block is None and not isinstance(site.layer, Positionwise):
            x = site.layer(*args, **kwargs)
        else:
            x = first_argument(args, kwargs)
        results.append(x)
        return x

    token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
    inputs = dict.fromkeys(model._inputs_struct)
    inputs["cache"] = [None] * len(model.blocks) * 2
    inputs["token_ids"] = token_ids
    positions = slots(index, token_ids.shape[1])[None, :]
    x, taps = model.replay(inputs, positions, call)
    return [*results, x, *taps.values()]


def _agree(whole, *steps):
    """Whether the results for single positions make up that for all."""
    dtype = keras.backend.standardize_dtype(whole.dtype)
    tolerance = 1e-3 if dtype in ("float32", "float64") else 0.05
    whole, *steps = (
        ops.convert_to_numpy(ops.cast(x, "float32")) for x in (whole, *steps)
    )
    steps = np.concatenate(steps, axis=1)
    if steps.shape != whole.shape:
        return False
    scale = np.nanmax(np.abs(whole), initial=1e-6)
    return np.allclose(
        whole, steps, rtol=0, atol=tolerance * scale, equal_nan=True
    )
