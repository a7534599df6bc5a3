"""Parts of decoder blocks, as what an edit applies to."""

import fnmatch
import functools
import math
import typing

import keras

from keras_nlp_cache.graph.sites import Site
from keras_nlp_cache.layers import weight_paths
from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.surgery.part_layers import OnResidual
from keras_nlp_cache.surgery.part_layers import Tap
from keras_nlp_cache.surgery.positionwise import check_layer
from keras_nlp_cache.surgery.rewiring import backbone_of
from keras_nlp_cache.surgery.rewiring import EditError

RESIDUAL = "residual"
WEIGHTS = "attention.weights"
_REPLACED_WITH_ATTENTION = (
    "attention.query",
    "attention.key",
    "attention.value",
    WEIGHTS,
)


class Part(typing.NamedTuple):
    """A part of a decoder block, at one call of the block.

    Args:
        name: The name of the block's call with that of the part.
        part: The name of the part, such as `"feedforward.down"`.
        site: The `Site` at which the block is called.
    """

    name: str
    part: str
    site: Site

    @property
    def block(self):
        """`None`: a part has no cache to be told by."""
        return None

    @property
    def path(self):
        """The attributes that lead from the block to the layer."""
        block = self.site.layer
        if self.part == RESIDUAL:
            return block.part_paths["attention"]
        if self.part == WEIGHTS:
            return (block.attention_name,)
        return block.part_paths[self.part]

    @property
    def layer(self):
        """The layer that is the part."""
        return _at(self.site.layer, self.path)

    @property
    def holders(self):
        """Names of the layers that hold the part inside of the block."""
        block = self.site.layer
        holders = self.path if self.part == WEIGHTS else self.path[:-1]
        paths = [holders[: i + 1] for i in range(len(holders))]
        return [_at(block, path).name for path in paths]

    def __repr__(self):
        return f"Part({self.name}: {type(self.layer).__name__})"

    @property
    def query_heads(self):
        """How many query heads the attention of the block has."""
        block = self.site.layer
        attention = getattr(block, block.attention_name)
        return attention.compute_query_shape(self.stream_shape)[2]

    @property
    def stream_shape(self):
        """`(B, T, hidden_dim)`, the shape of what branches start from."""
        return self.site.layer.stream_shape(self.site.shape)

    @property
    def shapes(self):
        """What the layer takes and returns, as two shapes."""
        block, hidden = self.site.layer, self.stream_shape
        attention = getattr(block, block.attention_name)
        heads = hidden
        if not hasattr(attention, "stand_in"):
            heads = attention.compute_query_shape(hidden)
            if attention.merges_heads:
                heads = (*heads[:2], math.prod(heads[2:]))
        if self.part in ("attention", "feedforward", RESIDUAL, WEIGHTS):
            return hidden, hidden
        if self.part.endswith("norm"):
            return hidden, hidden
        if self.part == "attention.output":
            return heads, hidden
        if self.part == "feedforward.down":
            up = block.part_paths["feedforward.up"]
            inner = _at(block, up).compute_output_shape(hidden)
            return tuple(inner), hidden
        return hidden, tuple(self.layer.compute_output_shape(hidden))


def parts_of(sites):
    """All parts of the decoder blocks among some sites, in order."""
    return [
        Part(f"{site.name}.{part}", part, site)
        for site in sites
        if site.block is not None
        for part in names_of(site.layer)
    ]


def names_of(block):
    """The names of the parts of a decoder block, in order."""
    names = list(block.part_paths)
    if names:
        names.append(RESIDUAL)
    # Those of tokens that are attended to, which a state has not.
    return names if block.has_state else [*names, WEIGHTS]


def matching(sites, pattern):
    """The parts that a pattern names.

    Args:
        sites: The `Site`s of a backbone.
        pattern: str, such as `"block.*.attention"`, in which blocks go by
            index, from the start or from the end, or by name.
    """
    if "." not in pattern:
        return []
    depth = sum(site.block is not None for site in sites)

    def matches(part):
        index = part.site.block
        names = (
            part.name,
            f"block.{index}.{part.part}",
            f"block.{index - depth}.{part.part}",
        )
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)

    return [part for part in parts_of(sites) if matches(part)]


class EditedBlocks:
    """The decoder blocks of a model with some of their parts changed.

    A block that is edited inside is another block, of the same class and over
    the same weights but for what was replaced.

    Args:
        model: A backbone or a `CausalLM`. It is left as it is.
        chosen: `Site`s and `Part`s. Only the latter count.
        change: Function `(block, part)` that returns the block with a part
            changed, for example by `change_part()`.
    """

    def __init__(self, model, chosen, change):
        self._sites = backbone_of(model).sites
        self._names = {site.layer.name for site in self._sites}
        self._change = change
        self._parts = {}
        for part in chosen:
            if isinstance(part, Part):
                self._parts.setdefault(part.site, []).append(part)
        self._edited = {}

    def layer(self, site):
        """The layer to call at a site."""
        if site not in self._parts:
            return site.layer
        parts = self._parts[site]
        key = id(site.layer), tuple(part.part for part in parts)
        if key not in self._edited:
            block, name = site.layer, self._name(site, key[1])
            for part in parts:
                # What is built for a part is named after where it stands.
                with weight_paths.scope("/".join([name, *part.holders])):
                    block = self._change(block, part)
            self._edited[key] = share(block, name=name)
        return self._edited[key]

    def _name(self, site, edited):
        """The name of the block, or another if it is called unedited, too."""
        name = site.layer.name
        for other in self._sites:
            if other.layer is not site.layer:
                continue
            parts = self._parts.get(other, ())
            if tuple(part.part for part in parts) != edited:
                while name in self._names:
                    name += "_edited"
        self._names.add(name)
        return name


def change_part(block, part, change):
    """A block with another layer in the place of a part.

    What taps a part stays around it, so that it sees what is changed.

    Args:
        block: A `DecoderBlock`. It is left as it is.
        part: A `Part` of it.
        change: Function from the layer to the one in its place.

    Raises:
        EditError: If the part is of an attention layer that was replaced.
    """
    attention = getattr(block, block.attention_name)
    if part.part in _REPLACED_WITH_ATTENTION and hasattr(attention, "stand_in"):
        raise EditError(
            f"Expected {part.name!r} to be called. Received: a block whose "
            f"attention was replaced by {attention.stand_in.name!r}. Edit "
            f"{part.site.name + '.attention'!r}, or edit first and replace "
            "then."
        )

    def at(layer, path):
        if path:
            inner = at(getattr(layer, path[0]), path[1:])
            return share(layer, **{path[0]: inner})
        return around(layer)

    def around(layer):
        if isinstance(layer, Tap):
            if layer.part == RESIDUAL or part.part != RESIDUAL:
                return share(layer, layer=around(layer.layer))
        if isinstance(layer, OnResidual) and part.part != RESIDUAL:
            return share(layer, part=around(layer.part))
        return change(layer)

    return at(block, part.path)


def _at(block, path):
    return functools.reduce(getattr, path, block)


def check_fits(layer, name, takes, returns):
    """Builds a layer that goes into a block, and checks what it does.

    Args:
        layer: What is to be called there.
        name: str, where.
        takes: Shape of what it will be called on.
        returns: Shape of what it is to return.

    Raises:
        EditError: If it is no layer or returns another shape.
        ValueError: If it mixes positions.
    """
    if not isinstance(layer, keras.layers.Layer):
        raise EditError(
            f"Expected a Keras layer at {name!r}, inside a decoder block. "
            f"Received: {layer!r}."
        )
    try:
        received = tuple(layer(keras.KerasTensor(takes, _dtype(layer))).shape)
    except Exception as e:
        received = f"{type(e).__name__}: {e}"
    if received != tuple(returns):
        raise EditError(
            f"Expected layer {layer.name!r}, at {name!r}, to turn inputs of "
            f"shape {tuple(takes)} into outputs of shape {tuple(returns)}. "
            f"Received: {received}."
        )
    check_layer(layer, takes)


def _dtype(layer):
    return layer.compute_dtype or keras.config.floatx()
