"""What an edit applies to."""

import fnmatch
import re

import keras

from keras_nlp_cache.sites import Site
from keras_nlp_cache.surgery.rewiring import backbone_of


def select(model, where):
    """Finds the calls in a model's graph that an edit would apply to.

    Args:
        model: A backbone or a `CausalLM` of this package.
        where: What to select:

            - a layer: all calls of that layer,
            - a string: layers of that name, which may be a pattern with `*`,
              `?` and `[...]`,
            - a compiled regular expression, searched for in the names,
            - a class: layers of that class,
            - an integer or a slice: decoder blocks by their place, as they
              would be picked from `backbone.blocks`,
            - a function that takes a layer and returns whether to select it,
            - a `Site` of this model, from an earlier selection,
            - a list or tuple of any of these: what any of them selects.

    Returns:
        A tuple of `Site`s, in the order in which the graph calls them. Each
        has a `layer`, a `name`, and for a decoder block the index `block` of
        its cache. A layer that is called twice has two sites, the second named
        with a number at its end.

    Raises:
        ValueError: If nothing is selected, or `where` is none of the above.

    Example:
    ```python
    for site in surgery.select(backbone, "transformer_layer_*"):
        print(site.name, site.block, site.shape)
    ```
    """
    sites = backbone_of(model).sites
    chosen = tuple(site for site in sites if _matcher(sites, where)(site))
    if not chosen:
        names = [site.name for site in sites]
        blocks = sum(site.block is not None for site in sites)
        raise ValueError(
            f"Expected `where` to select a call in the graph of {model.name!r}"
            f", which has {blocks} decoder blocks and is made of {names}. "
            f"Received: {where!r}, which selects nothing."
        )
    return chosen


def select_blocks(model, where):
    """Like `select()`, but only decoder blocks may be selected."""
    sites = select(model, where)
    for site in sites:
        if site.block is None:
            raise ValueError(
                "Expected `where` to select decoder blocks only. Received: "
                f"{where!r}, which selects {site.name!r} of type "
                f"{type(site.layer).__name__}."
            )
    return sites


def _matcher(sites, where):
    """A function that says whether a site is selected."""
    if isinstance(where, Site):
        return lambda site: site == where
    if isinstance(where, list | tuple | set | frozenset | range):
        matchers = [_matcher(sites, x) for x in where]
        return lambda site: any(matches(site) for matches in matchers)
    if isinstance(where, str):
        return lambda site: (
            fnmatch.fnmatchcase(site.layer.name, where) or site.name == where
        )
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
        "of a decoder block, a slice of them, a function of a layer, a site "
        f"from `select()`, or a list of these. Received: {where!r} of type "
        f"{type(where).__name__}."
    )
