"""What one layer reads of a cache, for later ones to read, too."""

import typing


class SharedKeys(typing.NamedTuple):
    """Keys and values that a layer reads and that others may read.

    Args:
        key: What the layer reads, `(B, key_value_heads, S, head_dim)`, a tensor
            or an `Int8`. With a policy, that is not all that is kept.
        value: Like it.
        kept: What is kept of the keys now. It says which slots were read.
            `None` without a cache.
    """

    key: typing.Any
    value: typing.Any
    kept: typing.Any = None
