"""Loads GGUF files whose matrices stay as they are stored.

Upstream's converters say which tensor of a file becomes which variable, and
how. They are asked while variables have no values yet, so that a matrix that
stays small is at no time a large one, too.
"""

import collections
import os
import sys
import typing
from collections.abc import Callable

import keras
import safetensors
from keras.src.backend.common import global_state
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader

from keras_nlp_cache.files import hugging_face
from keras_nlp_cache.files.empty_weights import draw_no_random_numbers
from keras_nlp_cache.files.gguf_preset import stored
from keras_nlp_cache.files.gguf_preset.conversion import KEPT
from keras_nlp_cache.files.gguf_preset.conversion import KEPT_WEIGHTS
from keras_nlp_cache.files.preset_loader import HuggingFaceLoader
from keras_nlp_cache.files.preset_loader import preset_loader
from keras_nlp_cache.products import grouped_layers


def loader_of(preset, keep_quantized=False):
    """Returns what loads a preset, with weights kept small if it says so.

    Args:
        preset: As for `CausalLM.from_preset()`.
        keep_quantized: bool. As there.

    Returns:
        A `PresetLoader` of keras_hub.

    Raises:
        ValueError: If it is not a preset, or has no weights to be kept.
    """
    loader = preset_loader(preset, keep_quantized)
    if isinstance(loader, HuggingFaceLoader) and KEPT in loader.config:
        return _KeptLoader(loader.preset, loader.config)
    return loader


class _Ported(typing.NamedTuple):
    """What a converter said of a variable.

    Attributes:
        variable: `keras.Variable`.
        key: str. The name of the tensor.
        hook: Function from the tensor, as Hugging Face has it, and the shape of
            the variable to its value. `None` if it is the tensor.
    """

    variable: keras.Variable
    key: str
    hook: Callable | None


class _Tensors(SafetensorLoader):
    """The tensors of a converted file, and what is to become of them.

    Args:
        preset: Path.
    """

    def __init__(self, preset):
        super().__init__(preset, fname=KEPT_WEIGHTS)
        self._file = self.enter_context(
            safetensors.safe_open(
                os.path.join(preset, KEPT_WEIGHTS), framework="np"
            )
        )
        self.safetensor_files[KEPT_WEIGHTS] = self._file
        self.ported = []

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        key = self.get_prefixed_key(hf_weight_key, self._file)
        self.ported.append(_Ported(keras_variable, key, hook_fn))

    def shape(self, key):
        return tuple(self._file.get_slice(key).get_shape())


class _KeptLoader(HuggingFaceLoader):
    def load_backbone(self, cls, load_weights, **kwargs):
        told = hugging_face.arguments(self.config)
        convert = self.converter.convert_backbone_config
        arguments = {**convert(self.config), **told, **kwargs}
        with _Tensors(self.preset) as tensors:
            with keras.StatelessScope():
                backbone = cls(**arguments)
                draw_no_random_numbers(backbone)
                self.converter.convert_weights(backbone, tensors, self.config)
                places = self._quantize(backbone, tensors)
            if load_weights:
                for ported in tensors.ported:
                    self._load(ported, tensors, places)
            self._tell(tensors, places)
        return backbone

    def _quantize(self, backbone, tensors):
        """Quantizes what can be kept.

        Returns:
            A dictionary from `id()` of variables that were to pairs of a layer
            and the name that `grouped_layers` has for the matrix.
        """
        kinds = {
            id(x.variable): self._kind(x.key, tensors) for x in tensors.ported
        }
        places = {}
        waiting = global_state.get_global_attribute("uninitialized_variables")
        count = len(waiting)
        for layer in backbone._flatten_layers(include_self=False):
            matrices = grouped_layers.matrices_of(layer)
            found = {
                kinds.get(id(variable), (None, 0))
                for variable, _ in matrices.values()
            }
            depths = {depth for _, depth in matrices.values()}
            # A layer has one dtype policy for all that it has.
            if len(found) != 1 or not depths == {depth for _, depth in found}:
                continue
            for name, (variable, _) in matrices.items():
                places[id(variable)] = layer, name
            ((kind, _),) = found
            grouped_layers.quantize_empty(layer, kind)
        if not places:
            raise ValueError(
                "Expected matrices that a layer here can keep as they are "
                f"stored. Received: {self.preset!r}, of a model that has none. "
                "Load it without `keep_quantized` (`--keep-quantized`)."
            )
        # Or Keras would give values to those that layers lost, too.
        in_use = {id(x) for x in backbone.variables}
        waiting[:] = [
            x
            for i, x in enumerate(waiting)
            if id(x) in in_use or (i < count and id(x) not in places)
        ]
        return places

    def _kind(self, key, tensors):
        """The format of a tensor, and how many numbers its rows have."""
        told = self.config[KEPT].get(key)
        if told is None:
            return None, 0
        _, size = tensors.shape(key)
        return told["format"], stored.depth(size, told["format"])

    def _load(self, ported, tensors, places):
        variable, key, hook = ported
        told = self.config[KEPT].get(key)
        x = tensors.get_tensor(key)

        def arrange(x):
            if told and told["transposed"]:
                x = x.T
            return x if hook is None else hook(x, list(variable.shape))

        if id(variable) in places:
            as_it_is = hook is None and not told["transposed"]
            grouped_layers.assign(
                *places[id(variable)],
                stored.take_apart(x, told["format"]),
                None if as_it_is else arrange,
            )
            return
        if told:
            x = stored.widened(x, told["format"])
        variable.assign(arrange(x))

    def _tell(self, tensors, places):
        """Says what was kept: a file may have less of it than its name says."""
        floats = {x.key for x in tensors.ported if id(x.variable) not in places}
        counts = collections.Counter(
            self.config[KEPT][key]["format"]
            for key in {x.key for x in tensors.ported} - floats
        )
        kept = " and ".join(f"{n} in {x}" for x, n in sorted(counts.items()))
        print(
            f"Kept as they are stored: {kept}. As floats: {len(floats)} other "
            "tensors.",
            file=sys.stderr,
        )
