"""Whatever a backbone is called with, it answers or says what is wrong."""

import numpy as np
from hypothesis import example
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from keras_nlp_cache.graph.inputs import OPTIONAL
from keras_nlp_cache.graph.roles import TEXT
from tests.families import examples
from tests.families import FAMILIES
from tests.families import to_numpy

LLAMA = FAMILIES[3]
TOKENS = [[1, 2, 3]]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.just(TOKENS),
    st.just(np.array(TOKENS)),
    st.builds(object),
    st.just(len),
    st.sets(st.integers(0, 3), max_size=2),
    arrays.arrays(
        st.sampled_from(["int64", "float16", "bool", "U2", "object", "M8[s]"]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
        fill=st.nothing(),
        elements=None,
    ).map(np.copy),
)
NESTED = st.recursive(
    LEAVES,
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.tuples(x, x),
        st.dictionaries(st.text(max_size=2), x, max_size=2),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from((*TEXT.of_upstream, *OPTIONAL))


def check(backbone, inputs):
    """Answers with hidden states of the right shape, or refuses."""
    try:
        output = backbone(inputs)
    except (ValueError, TypeError):
        return
    x = output[0] if isinstance(output, tuple) else output
    assert x.shape == (*np.shape(inputs["token_ids"]), 32)
    # An answer to what may not be read as something else.
    assert np.issubdtype(np.asarray(inputs["token_ids"]).dtype, np.number)
    to_numpy(x)


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.one_of(NESTED, st.dictionaries(KEYS, NESTED, max_size=4)))
def test_anything(inputs):
    check(LLAMA.pair[0], inputs)


@settings(
    deadline=None,
    max_examples=examples(150),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(KEYS, NESTED, st.booleans())
@example("cache", (([[1, 2, 3]], False), (False, False)), False)
@example("cache", (({"a": 1}, False), (False, False)), True)
def test_one_wrong_among_good_ones(key, value, with_cache):
    backbone = LLAMA.pair[0]
    inputs = {"token_ids": np.array(TOKENS)}
    if with_cache:
        inputs["cache"] = backbone.make_cache(1, 4)
        inputs["cache_update_index"] = 0
    inputs[key] = value
    check(backbone, inputs)
    # The backbone, and a cache that went in, are what they were.
    x = to_numpy(backbone({"token_ids": TOKENS}))
    np.testing.assert_allclose(x, expected(), atol=1e-5)
    if with_cache and key != "cache":
        assert not any(to_numpy(x).any() for x in inputs["cache"][0])


def expected():
    if not hasattr(expected, "value"):
        expected.value = to_numpy(
            LLAMA.pair[1](
                {"token_ids": np.array(TOKENS), "padding_mask": np.ones((1, 3))}
            )
        )
    return expected.value
