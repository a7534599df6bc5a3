"""Where tokens say where images are, each row has its own there."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.families import FAMILIES
from tests.families import IMAGE_MODELS
from tests.families import IMAGES
from tests.families import on_one_backend
from tests.families import padding_mask
from tests.families import random_tokens
from tests.families import randomize
from tests.families import to_numpy

FAMILY = next(x for x in IMAGE_MODELS if x.name == "gemma3n_vision")
TEXT = next(x for x in FAMILIES if x.name == "gemma3n")
TOKENS = random_tokens(2, 10)
MASK = np.ones_like(TOKENS)
SEE = FAMILY.mark
SOUND = dict(
    audio_encoder_config=dict(
        hidden_size=8,
        input_feat_size=8,
        sscp_conv_channel_size=[4, 4],
        sscp_conv_kernel_size=[(3, 3), (3, 3)],
        sscp_conv_stride_size=[(2, 2), (2, 2)],
        sscp_conv_group_norm_eps=1e-5,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
        gradient_clipping=1.0,
        residual_weight=0.5,
        num_attention_heads=1,
        attention_chunk_size=4,
        num_attention_context_right=0,
        num_attention_context_left=5,
        attention_logit_cap=50.0,
        conv_kernel_size=5,
        reduction_factor=1,
    ),
    audio_hidden_size=8,
    # Of both, two have to be told apart.
    vision_vocab_size=4,
    audio_vocab_offset=96,
    audio_vocab_size=4,
)


def without_places(inputs):
    names = "vision_mask", "vision_indices"
    return {k: x for k, x in inputs.items() if k not in names}


def two_and_one():
    """Two images in the first row and one in the second, filled up."""
    inputs = FAMILY.inputs(TOKENS, MASK)
    inputs["token_ids"][0, 6:] = inputs["token_ids"][0, 1]
    # At the end stands a token of text.
    token_ids = np.append(inputs["token_ids"], [[9], [6]], axis=1)
    images = np.stack([IMAGES, IMAGES[::-1]])
    images[1, 1] = 0
    return {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "images": images,
    }


def test_tokens_say_where_images_are():
    backbone, upstream = FAMILY.pair
    inputs = FAMILY.inputs(TOKENS, MASK)
    expected = to_numpy(upstream(without_places(inputs)))
    full = to_numpy(backbone(inputs))
    np.testing.assert_array_equal(full, expected)
    np.testing.assert_array_equal(
        to_numpy(backbone(without_places(inputs))), full
    )
    listed = [inputs[name] for name in ("token_ids", "padding_mask", "images")]
    np.testing.assert_array_equal(
        to_numpy(backbone([ops.convert_to_tensor(x) for x in listed])), full
    )
    cache = backbone.make_cache(2, 10)
    given = {**without_places(inputs), "cache": cache, "cache_update_index": 0}
    np.testing.assert_allclose(
        to_numpy(backbone(given)[0]), full, atol=1e-4, rtol=1e-4
    )
    lm, _ = FAMILY.lm_pair
    lm.compile(sampler="greedy")
    prompt = FAMILY.inputs(TOKENS, padding_mask([7, 8], 10))
    np.testing.assert_array_equal(
        lm.generate(without_places(prompt), stop_token_ids=None)["token_ids"],
        lm.generate(prompt, stop_token_ids=None)["token_ids"],
    )


def test_a_mask_leaves_out_what_was_generated():
    """A token with the id of images is embedded as text where it says so."""
    backbone, _ = FAMILY.pair
    inputs = FAMILY.inputs(TOKENS, MASK)
    inputs["token_ids"][:, 8] = inputs["token_ids"][0, 1]
    full = to_numpy(backbone(inputs))
    cache = backbone.make_cache(2, 10)
    calls = (
        {k: inputs[k][:, :8] for k in ("token_ids", "vision_mask")},
        {"token_ids": inputs["token_ids"][:, 8:]},
    )
    calls[0]["images"] = inputs["images"]
    found = []
    for index, given in zip((0, 8), calls):
        given |= {"cache": cache, "cache_update_index": index}
        x, cache = backbone(given)
        found.append(to_numpy(x))
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), full, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="most 4 tokens.*Received: 5"):
        backbone(without_places(inputs))


def test_each_row_has_its_own_images():
    """Upstream's second row reads what fills up the first one's."""
    backbone, upstream = FAMILY.pair
    inputs = two_and_one()
    full = to_numpy(backbone(inputs))
    for row, count in enumerate((2, 1)):
        alone = {k: x[row : row + 1] for k, x in inputs.items()}
        alone["images"] = alone["images"][:, :count]
        for model in (backbone, upstream):
            np.testing.assert_allclose(
                to_numpy(model(alone))[0], full[row], atol=1e-5
            )
    swapped = {k: x[::-1] for k, x in inputs.items()}
    np.testing.assert_allclose(
        to_numpy(backbone(swapped)), full[::-1], atol=1e-5
    )
    wrong = np.abs(to_numpy(upstream(swapped)) - full[::-1])
    assert wrong[0].max() < 1e-5 and wrong[1].max() > 1e-2


@on_one_backend("what prepares texts is upstream's")
def test_fit_on_images_and_texts():
    """With a preprocessor, one step of gradient descent is upstream's."""
    preprocessor = FAMILY.preprocessor(sequence_length=40)
    size = preprocessor.tokenizer.vocabulary_size()
    ours = FAMILY.task(FAMILY.backbone(vocabulary_size=size), preprocessor)
    theirs = FAMILY.upstream_task(
        FAMILY.upstream_backbone(ours.backbone, vocabulary_size=size),
        preprocessor,
    )
    data = {
        "prompts": [f"{SEE} the fox {SEE}", f"{SEE}{SEE} the dog"],
        "responses": ["jumps over", "quick"],
        "images": np.stack([IMAGES, IMAGES[::-1]]),
    }
    before = [to_numpy(x).copy() for x in ours.weights]
    for lm in (ours, theirs):
        lm.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        lm.fit(data, batch_size=2, epochs=1, verbose=0)
    for x, y in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(
            to_numpy(x), to_numpy(y), atol=1e-5, err_msg=x.path
        )
    # The tower learns, too.
    changed = {
        x.path for x, y in zip(ours.weights, before) if (to_numpy(x) != y).any()
    }
    assert any("conv_stem" in x for x in changed)
    text = {k: data[k] for k in ("prompts", "responses")}
    text["prompts"] = ["the fox", "the dog"]
    ours.fit(text, batch_size=2, epochs=1, verbose=0)


def test_text_with_a_model_that_sees_and_hears():
    """It needs neither, and tokens that stand for such are embedded."""
    config = FAMILY.arguments(**SOUND)
    ours = FAMILY.ours("Backbone")(**config)
    randomize(ours)
    upstream = FAMILY.upstream("Backbone")(**config)
    shapes = [[w.shape for w in x.weights] for x in (ours, upstream)]
    assert shapes[0] == shapes[1]
    upstream.set_weights(ours.get_weights())
    silent = {
        "input_features": np.zeros((2, 0, 0, 8), "float32"),
        "input_features_mask": np.zeros((2, 0, 0), bool),
    }
    none = {"images": np.zeros((2, 0, 16, 16, 3), "float32"), **silent}
    # Of images, and of sound.
    for token in (94, 97):
        token_ids = np.where(TOKENS > 40, token, TOKENS)
        inputs = {"token_ids": token_ids, "padding_mask": MASK}
        full = to_numpy(ours(inputs))
        np.testing.assert_array_equal(to_numpy(ours({**inputs, **none})), full)
        np.testing.assert_allclose(
            full, to_numpy(upstream({**inputs, **none})), atol=1e-5
        )
    inputs = FAMILY.inputs(token_ids, MASK)
    np.testing.assert_array_equal(
        to_numpy(ours({**inputs, **silent})),
        to_numpy(upstream({**without_places(inputs), **silent})),
    )
    noise = {"input_features": np.ones((2, 1, 8, 8), "float32")}
    with pytest.raises(ValueError, match="no `input_features`.*keras_hub"):
        ours({**inputs, **noise})
    lm = FAMILY.task(ours)
    lm.compile(sampler="greedy")
    prompt = FAMILY.inputs(TOKENS, padding_mask([7, 8], 10))
    for given in (
        prompt,
        {k: prompt[k] for k in ("token_ids", "padding_mask")},
    ):
        with pytest.raises(ValueError, match="no `input_features`.*keras_hub"):
            lm.generate({**given, **noise}, stop_token_ids=None)
    lm.generate({**prompt, **silent}, stop_token_ids=None)


def test_a_model_without_a_tower_sees_nothing():
    lm, _ = TEXT.lm_pair
    inputs = {"token_ids": TOKENS, "padding_mask": MASK}
    none = np.zeros((2, 0, 16, 16, 3), "float32")
    np.testing.assert_array_equal(
        to_numpy(lm.backbone({**inputs, "images": none})),
        to_numpy(lm.backbone(inputs)),
    )
    some = {**inputs, "images": IMAGES[:, None]}
    lm.compile(sampler="greedy")
    for call in (lm.backbone, lambda x: lm.generate(x, stop_token_ids=None)):
        with pytest.raises(ValueError, match="no `images`.*keras_hub"):
            call(some)
    with pytest.raises(ValueError, match="whose encoder reads them"):
        lm.backbone.encode_images(IMAGES[:, None])


def test_tokens_of_images_without_any():
    lm, _ = FAMILY.lm_pair
    lm.compile(sampler="greedy")
    prompt = without_places(FAMILY.inputs(TOKENS, padding_mask([7, 8], 10)))
    for images in (None, np.zeros((2, 0, 16, 16, 3), "float32")):
        with pytest.raises(ValueError, match="id 95.*none, for 8 such tokens"):
            lm.generate({**prompt, "images": images}, stop_token_ids=None)
    # Called as a model, it is given what there is.
    text = {"token_ids": TOKENS, "padding_mask": MASK}
    assert lm(text).shape == (2, 10, 100)


def test_upstreams_methods():
    lm, upstream = FAMILY.lm_pair
    inputs = FAMILY.inputs(TOKENS, MASK)
    names = "vision_indices", "vision_mask", "padding_mask"
    places = {name: inputs[name] for name in names}
    nothing = dict.fromkeys(
        ("input_features", "input_features_mask", "audio_indices", "audio_mask")
    )
    token_ids = ops.convert_to_tensor(inputs["token_ids"])
    seen = lm.backbone.encode_images(inputs["images"])
    images = ops.convert_to_tensor(inputs["images"])
    expected, _ = upstream._build_cache(token_ids, images, **places, **nothing)
    for pixels in (inputs["images"], seen):
        x, cache = lm._build_cache(token_ids, pixels, **places, **nothing)
        np.testing.assert_allclose(
            to_numpy(x), to_numpy(expected), atol=1e-4, rtol=1e-4
        )
        _, y, _ = lm.call_with_cache(
            token_ids, cache, 0, pixels, **places, **nothing
        )
        np.testing.assert_allclose(to_numpy(y), to_numpy(x), atol=1e-5)
