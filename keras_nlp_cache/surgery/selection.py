"""What an edit applies to."""

import fnmatch
import re

import keras

from keras_nlp_cache.graph.sites import Site
from keras_nlp_cache.surgery.parts import matching
from keras_nlp_cache.surgery.parts import Part
from keras_nlp_cache.surgery.parts import parts_of
from keras_nlp_cache.surgery.rewiring import backbone_of


def select(model, where):
    """Finds the calls in a model's graph that an edit would apply to.

    Args:
        model: A backbone or a `CausalLM` of this package.
        where: What to select:

            - a layer: all calls of that layer,
            - a string: layers of that name, which may be a pattern with `*`,
              `?` and `[...]`,
            - a string such as `"decoder.-1"` or `"encoder.3"`: blocks of the
              decoder or, in models that have one, of the encoder, by their
              place, or a pattern such as `"encoder.*"`,
            - a string such as `"block.*.attention"` or `"block.-1.residual"`:
              parts inside decoder blocks, by the index of the block (or its
              name) and the name of the part; see below,
            - a compiled regular expression, searched for in the names,
            - a class: layers of that class,
            - an integer or a slice: decoder blocks by their place, as they
              would be picked from `backbone.blocks`,
            - a function that takes a layer and returns whether to select it,
            - a `Site` or `Part` of this model, from an earlier selection,
            - a list or tuple of any of these: what any of them selects.

    A decoder block adds two things to the hidden states, one after the other:

    - `attention`, with its `attention.norm` before, its projections
      `attention.query`, `attention.key`, `attention.value` and
      `attention.output`, and `attention.weights`, which can be tapped only,
    - `feedforward`, with its `feedforward.norm` before, its projections
      `feedforward.gate` (where there is one), `feedforward.up` and
      `feedforward.down`,
    - and between the two there is `residual`, the sum of what came into the
      block and of what attention added. In GPT-NeoX, whose two branches start
      from the same, `feedforward.norm` does not see it.

    A mixture of experts is one `feedforward`, with no projections inside of
    which an edit could reach, and some families have one projection,
    `attention.query_key_value`, in place of three.

    Returns:
        A tuple of `Site`s and `Part`s, in the order in which the graph calls
        them. A `Site` has a `layer`, a `name`, and for a decoder block its
        index `block`, for one of an encoder `encoder_block`. A layer that is
        called twice has two sites, the second named with a number at its end. A
        `Part` has a `name`, a `layer`, and the `site` of its block.

    Raises:
        ValueError: If nothing is selected, or `where` is none of the above.

    Example:
    ```python
    for site in surgery.select(backbone, "transformer_layer_*"):
        print(site.name, site.block, site.shape)
    for part in surgery.select(backbone, "block.*.feedforward.up"):
        print(part.name, part.layer)
    ```
    """
    sites = backbone_of(model).sites
    matches = _matcher(sites, where)
    chosen = tuple(
        x for site in sites for x in (site, *parts_of([site])) if matches(x)
    )
    if not chosen:
        names = [site.name for site in sites]
        blocks = sum(site.block is not None for site in sites)
        raise ValueError(
            f"Expected `where` to select a call in the graph of {model.name!r}"
            f", which has {blocks} decoder blocks and is made of {names}. "
            f"A block has the parts {_part_names(sites)}, such as "
            f"'block.0.attention'. Received: {where!r}, which selects nothing."
        )
    return chosen


def select_blocks(model, where, of_encoder=False):
    """Like `select()`, but only decoder blocks may be selected.

    Args:
        model: As for `select()`.
        where: As for `select()`.
        of_encoder: bool. Whether those of an encoder may be, too.
    """
    sites = select(model, where)
    for site in sites:
        if site.block is None and not (of_encoder and site.is_block):
            raise ValueError(
                "Expected `where` to select decoder blocks only. Received: "
                f"{where!r}, which selects {site.name!r} of type "
                f"{type(site.layer).__name__}."
            )
    return sites


def _part_names(sites):
    return sorted({x.part for x in parts_of(sites)})


def _matcher(sites, where):
    """A function that says whether a site or a part is selected."""
    if isinstance(where, Site | Part):
        return lambda x: x == where
    if isinstance(where, list | tuple | set | frozenset | range):
        matchers = [_matcher(sites, x) for x in where]
        return lambda x: any(matches(x) for matches in matchers)
    if isinstance(where, str):
        parts = set(matching(sites, where))
        blocks = set(_places(sites, where))
        return lambda x: (
            x in parts
            if isinstance(x, Part)
            else x in blocks
            or fnmatch.fnmatchcase(x.layer.name, where)
            or x.name == where
        )
    matches = _site_matcher(sites, where)
    return lambda x: isinstance(x, Site) and matches(x)


def _places(sites, pattern):
    """The blocks that a pattern such as `"encoder.-1"` names."""
    for side, attribute in (
        ("decoder", "block"),
        ("encoder", "encoder_block"),
    ):
        blocks = [x for x in sites if getattr(x, attribute) is not None]
        for site in blocks:
            place = getattr(site, attribute)
            names = f"{side}.{place}", f"{side}.{place - len(blocks)}"
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                yield site


def _site_matcher(sites, where):
    if isinstance(where, re.Pattern):
        return lambda site: where.search(site.layer.name) is not None
    if isinstance(where, type):
        return lambda site: isinstance(site.layer, where)
    if isinstance(where, keras.Operation):
        return lambda site: site.layer is where
    if isinstance(where, slice):
        count = sum(site.block is not None for site in sites)
        blocks = range(count)[where]
        return lambda site: site.block is not None and site.block in blocks
    if hasattr(where, "__index__") and not isinstance(where, bool):
        count = sum(site.block is not None for site in sites)
        block = where.__index__()
        block = block + count if block < 0 else block
        return lambda site: site.block == block
    if callable(where):
        return lambda site: bool(where(site.layer))
    raise ValueError(
        "Expected `where` to be a layer, a name or pattern, a class, the index "
        "of a decoder block, a slice of them, a function of a layer, a site or "
        "part from `select()`, or a list of these. Received: "
        f"{where!r} of type {type(where).__name__}."
    )
