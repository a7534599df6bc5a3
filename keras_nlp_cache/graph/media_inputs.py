"""Checks and completes what a user passes of images, or of sound."""

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_nlp_cache.graph.inputs import as_tensor
from keras_nlp_cache.graph.inputs import check_shape


def normalize_media(inputs, backbone, text):
    """Completes the inputs of media, and in place of media, as tensors.

    Args:
        inputs: Dictionary of what was passed for each of `Roles.of_media`, or
            `None`.
        backbone: An `ImageTextBackbone` with towers.
        text: What `normalize()` made of all other inputs. `None` if there is
            no text.

    Returns:
        The dictionary, with tensors.

    Raises:
        ValueError: If a shape does not fit the model or the text, if there are
            images and what they became, or if there are none where there have
            to be some.
    """
    roles, cuts = backbone.roles, backbone.cuts
    found = dict.fromkeys(roles.of_media)
    for cut in cuts:
        medium = cut.medium
        _check_once(medium, inputs, roles)
        axes = medium.axes.get(medium.given, _AXES.get(len(cut.given.shape)))
        for name, like, named in (
            (medium.given, cut.given, axes),
            (medium.output, cut.tower, medium.axes.get(medium.output)),
        ):
            _take(name, inputs, found, like, named)
    _take(roles.embeddings, inputs, found, cuts.embeddings)
    inputs_of_graph = backbone._inputs_struct
    beside = {
        name: (inputs_of_graph[name].shape, x.axes.get(name))
        for x in roles.media
        for name in x.beside
    }
    if roles.grid_positions is not None:
        beside[roles.grid_positions] = (None, 4, None), None
    for name, (shape, axes) in beside.items():
        if inputs.get(name) is not None:
            found[name] = as_tensor(name, inputs[name], "int32")
            axes = axes or _AXES_BESIDE[len(shape)]
            _check_like(name, found[name], shape, axes)
    backbone.check_given(found)
    if text is not None:
        backbone.check_media(found, text)
    return found


def _check_once(medium, inputs, roles):
    """Checks that a medium is given in one of its forms, or in none."""
    names = medium.given, medium.output, roles.embeddings
    given = [name for name in names if inputs.get(name) is not None]
    if len(given) > 1:
        raise ValueError(
            f"Expected `{names[0]}`, or `{names[1]}` or `{names[2]}`, which "
            "were computed of some before. Received: "
            f"{' and '.join(given)}."
        )


def _take(name, inputs, found, like, axes=None):
    """Takes what was passed for one input, if it is like a symbolic tensor."""
    if inputs.get(name) is None:
        return
    found[name] = as_tensor(name, inputs[name], like.dtype, "iuf")
    axes = axes or _AXES_OF_EMBEDDINGS[len(like.shape)]
    _check_like(name, found[name], like.shape, axes)


# What the axes of images are.
_AXES = {
    4: ("batch", "height", "width", "channels"),
    5: ("batch", "images", "height", "width", "channels"),
    6: ("batch", "patches", "frames", "height", "width", "channels"),
}
_AXES_OF_EMBEDDINGS = {
    3: ("batch", "length", "hidden_dim"),
    4: ("batch", "images", "length", "hidden_dim"),
}
# What those of whatever comes beside images are.
_AXES_BESIDE = {
    2: ("batch", "length"),
    3: ("batch", "rows", "columns"),
    4: ("batch", "images", "patches", "coordinates"),
}


def _check_like(name, x, shape, axes):
    check_shape(name, x, **dict(zip(axes, shape)))


def known(x):
    """An array of what a tensor holds, `None` if there is none to be seen."""
    if x is None or isinstance(x, keras.KerasTensor) or in_symbolic_scope():
        return None  # For a shape, Keras may call on numbers of its own.
    try:
        return np.asarray(ops.convert_to_numpy(x))
    except (TypeError, NotImplementedError, RuntimeError, AttributeError):
        return None  # While it is being traced.


def check_rows(name, x, token_ids):
    """Raises a `ValueError` for something with other rows than a text."""
    rows = token_ids.shape[0]
    if None not in (rows, x.shape[0]) and x.shape[0] != rows:
        raise ValueError(
            f"Expected `{name}` to have one row for each of `token_ids`, of "
            f"shape {tuple(token_ids.shape)}. Received shape: "
            f"{tuple(x.shape)}."
        )


def check_length(name, x, length, token_ids):
    """Raises a `ValueError` for something longer or shorter than it should be.

    Args:
        name: str, what it is called.
        x: Tensor `(B, length, ...)`.
        length: int, or `None`.
        token_ids: Tensor `(B, T)`, the text that it goes with.
    """
    if None not in (length, x.shape[1]) and x.shape[1] != length:
        raise ValueError(
            f"Expected `{name}` of length {length}, for `token_ids` of shape "
            f"{tuple(token_ids.shape)}. Received shape: {tuple(x.shape)}."
        )
