"""What it is to have an entry in the cache."""


class Remembers:
    """Mixin for layers that have an entry in the cache.

    A block may hold several. Each finds its own entry in the call under way,
    by `block_call.entry_of()`.

    Attributes:
        key_value_shape: `(key_value_heads, head_dim)` of the keys and of the
            values.
        window: Optional int. How many positions a query sees, its own
            included.
        wants_distance: bool. Whether its `LayerCache` is to say how far apart
            tokens stand.
        state_shapes: `StateShapes` of a layer that keeps a state, `None` for
            one that keeps keys and values.
        joins_source: bool. Whether its one softmax is over the text and over
            what an encoder returned. It has a second entry then, for that.
        borrows: bool. Whether it has no entry of its own, and reads what an
            earlier layer reads. See `attention/sharing.py`.
        remembers: bool. `False` for one that sees all of a text at once, as in
            an encoder, and has no entry.
    """

    remembers = True
    state_shapes = None
    joins_source = False
    borrows = False
    window = None
    wants_distance = False
