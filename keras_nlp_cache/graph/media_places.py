"""Checks that images, or sound, are where a text has places for them."""

import math

import keras
import numpy as np

from keras_nlp_cache.graph.media_inputs import check_length
from keras_nlp_cache.graph.media_inputs import check_rows
from keras_nlp_cache.graph.media_inputs import known


def check_before_text(images, text, backbone):
    """Checks images that take the first slots, before those of the text.

    Args:
        images: Dictionary of tensors, or `None`, for `Roles.of_media`, of
            which at most one is beside images: which tokens are no prompt.
        text: What `normalize()` made of all other inputs.
        backbone: An `ImageTextBackbone`.

    Raises:
        ValueError: If a shape does not fit the text, or if there are images in
            another call than the first one, or none in that, where they have to
            be.
    """
    roles, before = backbone.roles, backbone.before
    token_ids, index = text[roles.token_ids], text["cache_update_index"]
    rows, length = token_ids.shape
    response = next(iter(roles.images.beside), None)
    given = [name for name, x in images.items() if x is not None]
    for name in given:
        check_rows(name, images[name], token_ids)
    for name, expected in (
        (response, length),
        (roles.embeddings, length and before + length),
    ):
        if name in given:
            check_length(name, images[name], expected, token_ids)
    has_image = roles.has_media(images)
    first = known(index)
    shape = rows, *backbone.cuts.images.given.shape[1:]
    wanted = (
        f"`{roles.images.given}` of shape {shape}, or "
        f"`{roles.images.output}` or `{roles.embeddings}` in their place"
    )
    lacks_image = backbone.needs_images and not has_image
    if index is None and lacks_image:
        raise ValueError(
            f"Expected {wanted}, with `token_ids` of shape "
            f"{tuple(token_ids.shape)}. Received none of them, and no "
            "cache."
        )
    if has_image and first is not None and np.any(first != 0):
        raise ValueError(
            "Expected `cache_update_index` to be 0 with images, which take "
            f"the first {before} slots. Received: {first}, with "
            f"`{given[0]}` of shape {tuple(images[given[0]].shape)}."
        )
    if lacks_image and first is not None and np.any(first < before):
        raise ValueError(
            f"Expected {wanted}, in the first call with a `cache`, whose "
            f"first {before} slots they take. Received none of them, "
            f"and `token_ids` of shape {tuple(token_ids.shape)} for the "
            f"slots from {np.min(first)} on."
        )
    if images.get(response) is not None and not has_image:
        raise ValueError(
            f"Expected `{response}` in the call that reads an image, since all "
            "of a prompt is read with it. Received one of shape "
            f"{tuple(images[response].shape)}, and no image."
        )


def check_in_text(media, text, roles, medium, count=None):
    """Checks what stands in the place of tokens.

    Args:
        media: Dictionary of tensors, or `None`, for `Roles.of_media`.
        text: What `normalize()` made of all other inputs.
        roles: `Roles`.
        medium: The `Medium` to check. The last two of what is beside it are
            where its tokens are, and a mask that is not 0 there.
        count: Optional int. How many tokens each has, if all have as many.

    Raises:
        ValueError: If a shape does not fit the text, if there are images, say,
            and no places or the other way round, or if one is not whole.
    """
    token_ids = text[roles.token_ids]
    length = token_ids.shape[1]
    *_, name = medium.beside
    mask = known(media[name])
    if media[name] is not None:
        check_rows(name, media[name], token_ids)
        check_length(name, media[name], length, token_ids)
    embeddings = media[roles.embeddings]
    if embeddings is None and not medium.is_in(media):
        if mask is not None and mask.any():
            raise ValueError(
                f"Expected `{medium.given}` for the tokens that `{name}`, of "
                f"shape {mask.shape}, says are of {medium.noun}s. Received: "
                f"none, for {int((mask != 0).sum())} such tokens."
            )
        return
    if embeddings is not None:
        check_rows(roles.embeddings, embeddings, token_ids)
        check_length(roles.embeddings, embeddings, length, token_ids)
    else:
        _check_places(media, token_ids, medium, count)
    if mask is not None and count is not None:
        _check_whole(name, mask != 0, medium, count)


def places_of(mask, length):
    """Where in each row tokens of images are.

    Args:
        mask: Array `(B, T)`, not 0 for these.
        length: int. How many there may be in a row.

    Returns:
        int32 array `(B, length)`. Those that are not needed are 0.
    """
    found = np.zeros((len(mask), length), "int32")
    for row, inside in zip(found, mask):
        places = np.flatnonzero(inside)
        row[: len(places)] = places
    return found


def _check_places(images, token_ids, medium, count):
    """Checks that each token of a medium has a place in the text."""
    *_, places, name = medium.beside
    given, nouns = medium.given, f"{medium.noun}s"
    if images[given] is None:
        given = medium.output
    shape = tuple(images[given].shape)
    missing = [x for x in (places, name) if images[x] is None]
    if missing:
        raise ValueError(
            f"Expected `{places}` and `{name}` with {nouns}, to say where in "
            f"the text they are. Received: `{given}` of shape {shape}, and no "
            f"{' and no '.join(missing)}."
        )
    check_rows(places, images[places], token_ids)
    number = None
    if len(shape) > 3:
        check_rows(given, images[given], token_ids)
        number = shape[1]
    elif None not in (shape[0], token_ids.shape[0]):
        if shape[0] % token_ids.shape[0]:
            raise ValueError(
                f"Expected `{given}` with as many {nouns} for each row of "
                f"`token_ids`, of shape {tuple(token_ids.shape)}. Received "
                f"shape: {shape}."
            )
        number = shape[0] // token_ids.shape[0]
    if None not in (number, count):
        check_length(places, images[places], number * count, token_ids)
    indices, mask = known(images[places]), known(images[name])
    if indices is None or mask is None:
        return
    # Those that are not needed are 0.
    for row, (found, said) in enumerate(zip(indices, mask)):
        said = np.flatnonzero(said)
        if list(said) != list(found[found != 0]):
            raise ValueError(
                f"Expected `{places}` to name the tokens where `{name}` is not "
                f"0. Received, in row {row}: {found.tolist()}, and a mask that "
                f"is not 0 at {said.tolist()}."
            )
    if not mask.any():
        raise ValueError(
            f"Expected `{name}`, of shape {mask.shape}, to say where {nouns} "
            f"are. Received: `{given}` of shape {shape}, and a mask of zeros. "
            f"Put a placeholder for each {medium.noun} into a prompt."
        )


def _check_whole(name, mask, medium, count):
    """Checks that images are whole, whose tokens see each other."""
    for row, inside in enumerate(mask):
        ends = np.diff(np.pad(inside.astype(int), 1))
        lengths = np.flatnonzero(ends == -1) - np.flatnonzero(ends == 1)
        if (lengths % count).any():
            raise ValueError(
                f"Expected each {medium.noun} to have {count} tokens side by "
                f"side, all of them in one call. Received a `{name}` of shape "
                f"{mask.shape} with {lengths.tolist()} in row {row}."
            )


def check_side_by_side(media, medium, count):
    """Checks that the tokens of each clip stand side by side.

    Clips have as many places each, and need some of them. If places of one were
    left for others, these would be taken for its own.

    Args:
        media: As for `check_in_text()`.
        medium: The `Medium` to check.
        count: int. How many places each clip has, `None` if it is not known.
    """
    *_, name, _ = medium.beside
    places = known(media[name])
    if places is None or count is None:
        return
    for row, of_row in enumerate(places):
        for of_clip in of_row.reshape(-1, count):
            needed = of_clip[of_clip != 0]
            apart = (np.diff(needed) != 1).any()
            if apart or of_clip[len(needed) :].any():
                raise ValueError(
                    f"Expected `{name}` with {count} places for each "
                    f"{medium.noun}, those of its tokens, side by side, and 0 "
                    "for those that it does not need. Received, in row "
                    f"{row}: {of_row.tolist()}."
                )


def check_in_grids(images, text, roles, merged):
    """Checks images of any size that stand in the place of tokens.

    Args:
        images: Dictionary of tensors, or `None`, for `Roles.of_media`, of
            which two are beside images: how many patches they have, `(B, N,
            3)`, and where tokens of images are, counted over all rows.
        text: What `normalize()` made of all other inputs.
        roles: `Roles`.
        merged: int. How many patches of a row, and how many rows, become one
            token.

    Raises:
        ValueError: If a shape does not fit the text, or if there are images and
            no places or the other way round.
    """
    token_ids = text[roles.token_ids]
    _check_grid_positions(images, text, roles)
    if not roles.has_media(images):
        for name in roles.images.beside:
            if images[name] is not None:
                raise ValueError(
                    f"Expected `{roles.images.given}` with `{name}`. Received: "
                    f"no images, and `{name}` of shape "
                    f"{tuple(images[name].shape)}."
                )
        return
    embeddings = images[roles.embeddings]
    if embeddings is not None:
        check_rows(roles.embeddings, embeddings, token_ids)
        check_length(
            roles.embeddings, embeddings, token_ids.shape[1], token_ids
        )
        return
    grid, places = roles.images.beside
    given, needed = roles.images.given, (grid, places)
    if images[given] is None:
        given, needed = roles.images.output, (places,)
    shape = tuple(images[given].shape)
    missing = [name for name in needed if images[name] is None]
    if missing:
        raise ValueError(
            f"Expected {' and '.join(f'`{x}`' for x in needed)} with images. "
            f"Received: `{given}` of shape {shape}, and no "
            f"{' and no '.join(missing)}."
        )
    count = shape[0] * shape[1] if None not in shape[:2] else None
    if given == roles.images.given:
        count = _check_grid(images, roles, count, merged)
    _check_flat_places(places, images[places], count, token_ids)


def _check_grid_positions(images, text, roles):
    """Checks where tokens stand, if that is given."""
    positions = images.get(roles.grid_positions)
    if positions is None:
        return
    name, token_ids = roles.grid_positions, text[roles.token_ids]
    check_rows(name, positions, token_ids)
    if text["token_positions"] is not None:
        raise ValueError(
            f"Expected `{name}` or `token_positions`, which both say where "
            "tokens stand. Received both."
        )
    length = token_ids.shape[1]
    if None not in (length, positions.shape[2]):
        if positions.shape[2] != length:
            raise ValueError(
                f"Expected `{name}` of shape (batch, 4, {length}), for "
                f"`token_ids` of shape {tuple(token_ids.shape)}. Received "
                f"shape: {tuple(positions.shape)}."
            )


def _check_grid(images, roles, patches, merged):
    """Checks that images have the patches that is said of them.

    Returns:
        How many tokens they become, `None` if that is not known.
    """
    name, (grid, _) = roles.images.given, roles.images.beside
    if isinstance(images[grid], keras.KerasTensor):
        return None
    sizes = known(images[grid])
    if sizes is None:
        raise ValueError(
            f"Expected `{grid}` to hold numbers, of which it depends what is "
            "to be computed. Received: a tensor without any yet, in a function "
            f"that is being compiled. Call `embed()` before it, and pass "
            f"`{roles.embeddings}` to it, or train with `run_eagerly=True`."
        )
    sizes = sizes.reshape(-1, 3)
    if (sizes < 1).any() or (sizes[:, 1:] % merged).any():
        raise ValueError(
            f"Expected `{grid}` to hold numbers of patches of 1 or more, in "
            f"height and width multiples of {merged}. Received: "
            f"{sizes.tolist()}."
        )
    found = int(sizes.prod(axis=1).sum())
    if patches is not None and found != patches:
        raise ValueError(
            f"Expected `{name}` to have the {found} patches of `{grid}`, "
            f"{sizes.tolist()}. Received: {patches}, of shape "
            f"{tuple(images[name].shape)}."
        )
    return found // merged**2


def _check_flat_places(name, places, count, token_ids):
    """Checks that each token of an image has a place in some text."""
    shape = tuple(places.shape)
    if count is not None and None not in shape and math.prod(shape) != count:
        raise ValueError(
            f"Expected `{name}` to name the places of all {count} tokens of "
            f"images. Received shape: {shape}. A text that was cut may have "
            "lost some."
        )
    indices = known(places)
    if indices is None or None in token_ids.shape:
        return
    indices, size = indices.reshape(-1), math.prod(token_ids.shape)
    if (
        len(np.unique(indices)) < len(indices)
        or ((indices < 0) | (indices >= size)).any()
    ):
        raise ValueError(
            f"Expected `{name}` to name tokens from 0 to {size - 1}, row by "
            "row, each once, for `token_ids` of shape "
            f"{tuple(token_ids.shape)}. Received: {indices.tolist()}."
        )
