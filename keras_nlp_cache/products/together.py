"""Which products of a decoder block have the same input, and can be one.

Queries, keys and values are projected from one tensor, and so are the two
halves of a gated feedforward. To divide a product among cores, and to meet
again behind it, takes tens of microseconds, of a step that has hundreds of
them: weights that lie below each other are multiplied with at once.
"""

from keras_nlp_cache.products.rounding import is_rounding

_TOGETHER = (
    ("attention.query", "attention.key", "attention.value"),
    ("feedforward.gate", "feedforward.up"),
)


def layers_together(backbone):
    """Lists of layers of a backbone that are called with the same input.

    Args:
        backbone: A `CachedBackbone`, or `None`.

    Returns:
        A list of lists of layers, each of two or more.
    """
    found = []
    for block in getattr(backbone, "blocks", ()):
        paths = getattr(block, "part_paths", {})
        for names in _TOGETHER:
            layers = [
                _at(block, paths[name]) for name in names if name in paths
            ]
            if len(layers) > 1:
                found.append(layers)
    return found


def rounding_of(layer):
    """What a kernel does with the input of a layer, as it comes.

    Args:
        layer: A dense layer.

    Returns:
        The `epsilon` that it rounds with, 0 if it does not, or `None` if the
        layer makes another tensor of its input first.
    """
    quantizer = getattr(layer, "inputs_quantizer", None)
    if layer.quantization_mode is None or quantizer is None:
        return 0
    # Of weights in groups, the kernel does not.
    if layer.quantization_mode == "int8" and is_rounding(quantizer):
        return quantizer.epsilon
    return None


def _at(block, path):
    for name in path:
        block = getattr(block, name)
    return block
