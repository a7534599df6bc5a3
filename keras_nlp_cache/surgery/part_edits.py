"""What the edits do to a part of a decoder block.

Each is, or makes, a function `(block, part)` that returns the edited block.
"""

import keras

from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.surgery.adapters import AttentionSink
from keras_nlp_cache.surgery.part_layers import BranchStart
from keras_nlp_cache.surgery.part_layers import Chain
from keras_nlp_cache.surgery.part_layers import InsteadOfBranch
from keras_nlp_cache.surgery.part_layers import Nothing
from keras_nlp_cache.surgery.part_layers import OnResidual
from keras_nlp_cache.surgery.part_layers import Tap
from keras_nlp_cache.surgery.part_layers import WeightsTap
from keras_nlp_cache.surgery.parts import change_part
from keras_nlp_cache.surgery.parts import check_fits
from keras_nlp_cache.surgery.parts import RESIDUAL
from keras_nlp_cache.surgery.parts import WEIGHTS
from keras_nlp_cache.surgery.rewiring import EditError

_BRANCHES = ("attention", "feedforward")


def insert_after(inserted):
    """Inserts the layer that `inserted(part)` returns behind a part."""

    def edit(block, part):
        _refuse_weights(part)
        layer, (_, returns) = inserted(part), part.shapes
        check_fits(layer, part.name, returns, returns)
        if part.part == RESIDUAL:
            return _on_residual(block, part, layer, on_sum=True)
        return change_part(
            block,
            part,
            lambda old: Chain(old, layer, **_named(block, old, layer.name)),
        )

    return edit


def insert_before(inserted):
    """Inserts the layer that `inserted(part)` returns in front of a part."""

    def edit(block, part):
        _refuse_weights(part)
        # What a branch starts from is what its norm returns. The first that
        # goes into the sum is what attention returns.
        if part.part in _BRANCHES:
            behind = part._replace(part=f"{part.part}.norm")
        elif part.part == RESIDUAL:
            behind = part._replace(part="attention")
        else:
            layer, (takes, _) = inserted(part), part.shapes
            check_fits(layer, part.name, takes, takes)
            return change_part(
                block,
                part,
                lambda old: Chain(layer, old, **_named(block, old, layer.name)),
            )
        return insert_after(lambda _: inserted(part))(block, behind)

    return edit


def replace(replacement):
    """Puts the layer that `replacement(part)` returns in a part's place."""

    def edit(block, part):
        _refuse_weights(part)
        layer, (takes, returns) = replacement(part), part.shapes
        check_fits(layer, part.name, takes, returns)
        if part.part == RESIDUAL:
            return _on_residual(block, part, layer, on_sum=False)
        if part.part in _BRANCHES:
            return _replace_branch(block, part, layer)
        return change_part(block, part, lambda old: layer)

    return edit


def remove(block, part):
    """Takes a part out of a block."""
    _refuse_weights(part)
    takes, returns = part.shapes
    if part.part == RESIDUAL:
        return _on_residual(block, part, None, on_sum=False)
    if part.part in _BRANCHES:
        return _replace_branch(block, part, None)
    if takes != returns:
        raise EditError(
            "Expected a part to remove that returns the shape that it takes. "
            f"Received: {part.name!r}, which turns inputs of shape {takes} "
            f"into outputs of shape {returns}. Replace it, or remove all of "
            f"{part.part.split('.')[0]!r}."
        )
    return change_part(block, part, lambda old: _identity(block, old))


def tap(block, part):
    """Has a block return what a part of it does."""
    if part.part in block.tapped_parts:
        return block
    if part.part == WEIGHTS:
        return _tap_weights(block, part)
    _refuse_dropped(block, part)
    _, returns = part.shapes
    return change_part(
        block,
        part,
        lambda old: Tap(
            old, part.part, returns[2:], **_named(block, old, "tap")
        ),
    )


def _tap_weights(block, part):
    def tapped(attention):
        function = getattr(attention, "replaced_attention", None)
        if function is not None and not isinstance(function, AttentionSink):
            raise EditError(
                "Expected an attention layer that attends as its family does, "
                f"to tap its weights. Received: {part.name!r}, whose attention "
                f"function was replaced by {function.name!r}."
            )
        heads = attention.compute_query_shape(part.stream_shape)[2]
        tap = WeightsTap(function, heads, **_named(block, attention, "weights"))
        return share(attention, replaced_attention=tap)

    return change_part(block, part, tapped)


def _on_residual(block, part, layer, on_sum):
    _refuse_dropped(block, part)
    return change_part(
        block,
        part,
        lambda old: OnResidual(
            old, layer, on_sum, **_named(block, old, "residual")
        ),
    )


def _replace_branch(block, part, layer):
    """Puts a layer, or nothing, in the place of attention or feed-forward."""

    def put(name, change):
        nonlocal block
        if name in block.part_paths:
            block = change_part(block, part._replace(part=name), change)

    def drop(name):
        put(name, lambda old: _identity(block, old))

    if part.part == "attention":
        tapped = {x for x in block.tapped_parts if x.startswith("attention.")}
        if tapped - {"attention.norm", "attention.post_norm"}:
            raise EditError(
                f"Expected {part.name!r}, which is to go, to have no taps "
                f"inside. Received: {sorted(tapped)}. Tap afterwards."
            )
        stand_in = Nothing(name="nothing") if layer is None else layer
        attention = getattr(block, block.attention_name)
        attention = share(attention, stand_in=stand_in)
        block = share(block, **{block.attention_name: attention})
        drop("attention.output")
        drop("attention.post_norm")
        return block
    for name in ("gate", "up", "down"):
        drop(f"feedforward.{name}")
    if layer is None:
        drop("feedforward.norm")
    else:
        put(
            "feedforward.norm",
            lambda old: BranchStart(
                old, part.part, **_named(block, old, "start")
            ),
        )
    put(
        part.part,
        lambda old: InsteadOfBranch(
            layer,
            part.part,
            _further(old, part.site.shape[-1]),
            **_named(block, old, "replaced"),
        ),
    )
    return block


def _further(old, hidden_dim):
    """How many things the last layer of a branch returns beyond the first.

    Args:
        old: The layer. The projections before it are gone already.
        hidden_dim: int. The size of what the branch takes.
    """
    if isinstance(old, InsteadOfBranch):
        return old.further
    x = keras.KerasTensor((1, 2, hidden_dim), old.compute_dtype)
    outputs = old.compute_output_spec(x)
    return len(outputs) - 1 if isinstance(outputs, tuple) else 0


def _identity(block, old):
    return keras.layers.Identity(**_named(block, old, "removed"))


def _named(block, old, suffix):
    return dict(dtype=block.compute_dtype, name=f"{old.name}_{suffix}")


def _refuse_dropped(block, part):
    attention = getattr(block, block.attention_name)
    if part.part == RESIDUAL and attention.drops_output:
        raise EditError(
            f"Expected {part.name!r} to be known before the block goes on. "
            f"Received: a block whose attention, {attention.name!r}, has a "
            "dropout behind the last layer that an edit can reach. Construct "
            "the backbone with `dropout=0`."
        )


def _refuse_weights(part):
    if part.part == WEIGHTS:
        raise EditError(
            "Expected a part that is a layer. Received: "
            f"{part.name!r}, which can be tapped only. Use "
            "`replace_attention()` to attend in another way."
        )
