"""The cache is part of the graph, and the graph is an ordinary Keras one."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

from tests.families import deep_families
from tests.families import each_kind
from tests.families import every_family
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import to_numpy

TOKENS = random_tokens(2, 8)
INPUTS = {"token_ids": TOKENS, "padding_mask": padding_mask([5, 8], 8)}
OPTIONAL = {
    "cache_update_index",
    "token_positions",
    "attention_mask",
}


@each_kind
def test_optional_inputs_are_inputs_of_the_graph(family):
    backbone, upstream = family.pair
    inputs = set(family.inputs(**INPUTS))
    names = {
        x.name
        for x in backbone.operations
        if isinstance(x, keras.layers.InputLayer)
    }
    entries = {
        f"cache_{i}_{x}"
        for i in range(len(backbone.cache_spec))
        for x in ("key", "value")
    }
    assert names == OPTIONAL | entries | inputs
    # What models are built on is upstream's.
    assert set(backbone.input) == inputs
    assert [x.name for x in backbone.inputs] == [
        x.name for x in upstream.inputs
    ]
    # They reach the blocks along the graph, not past it.
    consumers = {name: set() for name in names}
    for operation in backbone.operations:
        for node in operation._inbound_nodes:
            for x in node.input_tensors:
                if x.name in consumers:
                    consumers[x.name].add(operation)
    entry = 0
    patched = not hasattr(backbone, "blocks")
    for block in backbone.transformer_layers if patched else backbone.blocks:
        for _ in range(1 if patched else block.entry_count):
            for name in (f"cache_{entry}_key", f"cache_{entry}_value"):
                assert block in consumers[name]
            entry += 1
        assert block in consumers["cache_update_index"]
    assert 2 * entry == len(entries)
    assert all(consumers.values())


@every_family
def test_called_symbolically(family):
    backbone, _ = family.pair
    token_ids = keras.Input((None,), dtype="int32")
    index = keras.Input(batch_shape=(), dtype="int32")
    if getattr(backbone, "has_states", False):
        # Of one size, whatever the text.
        cache = tree.map_structure(
            lambda x: keras.Input(x.shape[1:]), backbone.make_cache(2, 8)
        )
    else:
        cache = tuple(
            tuple(keras.Input((heads, None, dim)) for _ in range(2))
            for heads, dim in backbone.cache_spec
        )
    alone = backbone({"token_ids": token_ids})
    assert alone.shape == backbone.output.shape
    hidden_states, new_cache = backbone(
        {
            "token_ids": token_ids,
            "cache": cache,
            "cache_update_index": index,
        }
    )
    assert tree.map_structure(lambda x: x.shape, new_cache) == (
        tree.map_structure(lambda x: x.shape, cache)
    )
    model = keras.Model([token_ids, index, cache], [hidden_states, new_cache])
    output, filled = model(
        [
            ops.convert_to_tensor(TOKENS),
            ops.convert_to_tensor(0, dtype="int32"),
            backbone.make_cache(2, 8),
        ]
    )
    np.testing.assert_allclose(
        to_numpy(output),
        to_numpy(backbone({"token_ids": TOKENS})),
        atol=family.tolerance,
    )
    written = [to_numpy(x) for x in tree.flatten(filled)]
    assert all(x.any() for x in written if x.size)
    if not getattr(backbone, "has_states", False):
        assert all(np.abs(x).max(axis=-1).all() for x in written)


@deep_families
def test_extended_as_a_functional_model(family):
    """What keras_hub documents: build on `backbone.input` and `.output`."""
    backbone, upstream = family.pair
    head = keras.layers.Dense(3)
    ours = keras.Model(backbone.input, head(backbone.output))
    theirs = keras.Model(upstream.input, head(upstream.output))
    np.testing.assert_allclose(
        to_numpy(ours(INPUTS)), to_numpy(theirs(INPUTS)), atol=1e-6
    )


def features(backbone, inputs, names):
    """A model of the inputs and outputs of layers inside."""
    layers = [backbone.get_layer(name) for name in names]
    return keras.Model(
        inputs,
        {layer.name: [layer.input, layer.output] for layer in layers},
    )


@each_kind
def test_activations_as_of_a_functional_model(family):
    """What tutorials do: build on the `output` of a layer inside."""
    backbone, upstream = family.pair
    inputs = family.inputs(**INPUTS)
    graph = keras.Model(upstream.input, upstream.output)
    names = [x.name for x in graph.layers if x.name not in inputs]
    ours = features(backbone, backbone.input, names)(inputs)
    theirs = features(upstream, upstream.input, names)(inputs)
    listed = [inputs[x.name] for x in upstream.inputs]
    flat = features(backbone, backbone.inputs, names)(listed)
    for other in (theirs, flat):
        tree.map_structure(
            lambda x, y: np.testing.assert_allclose(
                to_numpy(x), to_numpy(y), atol=1e-6
            ),
            ours,
            other,
        )
    if family.name == "gemma3n":
        return  # Its blocks are in no layer of ours, and in one of upstream's.
    # A model of a part of the graph, from activations on.
    first, last = backbone.get_layer(index=-2), upstream.layers[-1]
    head = keras.Model(first.output, backbone.output)
    np.testing.assert_allclose(
        to_numpy(head(theirs[first.name][1])),
        to_numpy(theirs[last.name][1]),
        atol=1e-6,
    )


@deep_families
def test_cloned(family):
    backbone, upstream = family.pair
    clone = keras.models.clone_model(backbone)
    clone.set_weights(backbone.get_weights())
    assert not set(map(id, clone.weights)) & set(map(id, backbone.weights))
    np.testing.assert_allclose(
        to_numpy(clone(INPUTS)), to_numpy(upstream(INPUTS)), atol=1e-6
    )


@deep_families
def test_summarized(family):
    lines = []
    family.pair[0].summary(print_fn=lines.append)
    text = "\n".join(map(str, lines))
    for name in (*OPTIONAL, *INPUTS):
        assert name[:15] in text, name


@deep_families
def test_plotted(family):
    backbone, _ = family.pair
    graph = keras.utils.model_to_dot(backbone, show_layer_names=True)
    source = graph.to_string()
    for name in (*OPTIONAL, *INPUTS):
        assert name in source


@pytest.mark.skipif(
    shutil.which("dot") is None,
    reason="drawing a picture needs graphviz' program `dot`",
)
@deep_families
def test_drawn(family, tmp_path):
    backbone, _ = family.pair
    path = tmp_path / "model.png"
    keras.utils.plot_model(backbone, to_file=str(path), show_shapes=True)
    assert path.stat().st_size > 1000


@each_kind
def test_output_structure_follows_from_the_cache(family):
    backbone, _ = family.pair
    inputs = {"token_ids": TOKENS, "cache": None, "cache_update_index": None}
    assert ops.is_tensor(backbone(inputs))
    entries = len(backbone.cache_spec)
    inputs["cache"] = ((None, None),) * entries
    assert ops.is_tensor(backbone(inputs))
    inputs["cache"] = backbone.make_cache(2, 8)
    inputs["cache_update_index"] = 0
    hidden_states, cache = backbone(inputs)
    assert ops.is_tensor(hidden_states)
    assert isinstance(cache, tuple) and len(cache) == entries
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in cache)
