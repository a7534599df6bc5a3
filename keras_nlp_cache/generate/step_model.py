"""One step of a model as a function of tensors alone, to run outside Python."""

import keras

from keras_nlp_cache.cache.policies.state import is_state
from keras_nlp_cache.cache.policies.state import State
from keras_nlp_cache.cache.policies.state import StateShapes
from keras_nlp_cache.generate.prompts import is_int
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.backbone import without_taps
from keras_nlp_cache.graph.calling import floating_dtype
from keras_nlp_cache.graph.calling import plain_python


class StepModel(keras.Model):
    """A stateless decode step: tokens and a cache in, a cache out.

    It shares the layers of a backbone or a task. Unlike theirs, its inputs and
    outputs are flat dictionaries of tensors of known shapes, which is what
    runtimes such as ONNX Runtime call: `step.export("step.onnx", "onnx")`.

    Args:
        model: A backbone or a `CausalLM` of this package.
        batch_size: int. Number of sequences.
        max_length: int. Number of slots.
        length: int. How many tokens a call takes.
        dtype: Optional floating dtype of the cache. Defaults to the compute
            dtype of the model.
        index_per_row: bool. Whether each sequence stands at a slot of its own,
            rather than all at the same.

    Raises:
        ValueError: If the model is of another package or has an encoder, or a
            size is no positive integer or more than the model can hold.

    Attributes:
        input_signature: `keras.InputSpec` of each input, by name.
        output_names: The names of the outputs, in the order in which an ONNX
            file has them. PyTorch's exporter gives them names of its own.

    Call arguments:
        inputs: Dictionary with `token_ids`, int32 `(B, length)`;
            `cache_update_index`, int32 `()`, or `(B,)` with `index_per_row`;
            and for each decoder block `i`
            `past_key_i` and `past_value_i`, `(B, key_value_heads, max_length,
            head_dim)`, or what a layer with a state keeps in their place.

    Returns:
        Dictionary with `logits` `(B, length, vocabulary_size)`, or of a
        backbone `hidden_states` `(B, length, hidden_dim)`; and the updated
        `present_key_i` and `present_value_i`. `cache_update_index` is not
        checked.

    Example:
    ```python
    step = keras_nlp_cache.StepModel(lm, batch_size=1, max_length=64)
    inputs = {
        name: np.zeros(spec.shape, spec.dtype)
        for name, spec in step.input_signature.items()
    }
    inputs["token_ids"][:] = 5
    logits = step(inputs)["logits"]
    ```
    """

    def __init__(
        self,
        model,
        batch_size,
        max_length,
        length=1,
        dtype=None,
        index_per_row=False,
    ):
        super().__init__(name=f"{model.name}_step")
        backbone = getattr(model, "backbone", model)
        if not isinstance(backbone, CachedBackbone):
            raise ValueError(
                "Expected `model` to be a backbone or a `CausalLM` of "
                "`keras_nlp_cache.models`. Received an instance of "
                f"{type(model).__module__}.{type(model).__name__}."
            )
        if backbone.takes_generated:
            raise ValueError(
                "Expected a model that treats all tokens alike. Received: "
                f"{model.name!r}, steered at generated tokens only, which a "
                "step cannot tell. Apply the control vector to all tokens."
            )
        if backbone.roles.source is not None:
            raise ValueError(
                "Expected a model without an encoder, since what that returned "
                "would be as long as what it read, and be an input of each "
                f"step. Received: {model.name!r}. Call `generate()` or "
                "`stream()`."
            )
        backbone.check_cache_size(batch_size, max_length)
        _check_length(length, max_length)
        # Tracks the weights.
        self.model = model
        self._output_name = "hidden_states" if model is backbone else "logits"
        dtype = floating_dtype("dtype", dtype or backbone.compute_dtype)
        self._names = []
        specs = {
            "cache_update_index": (
                (batch_size,) if index_per_row else (),
                "int32",
            ),
            "token_ids": ((batch_size, length), "int32"),
        }
        self._spec = backbone.cache_spec
        for i, spec in enumerate(self._spec):
            self._names.append((f"key_{i}", f"value_{i}"))
            for name, shape in zip(self._names[-1], _shapes(spec, max_length)):
                is_state = isinstance(spec, StateShapes)
                specs[f"past_{name}"] = (
                    (batch_size, *shape),
                    "float32" if is_state else dtype,
                )
        self._input_specs = {
            name: keras.InputSpec(shape=shape, dtype=dtype, name=name)
            for name, (shape, dtype) in sorted(specs.items())
        }
        self.built = True

    @property
    def input_signature(self):
        return dict(self._input_specs)

    @property
    def output_names(self):
        names = [f"present_{name}" for pair in self._names for name in pair]
        return sorted([*names, self._output_name])

    @plain_python
    def call(self, inputs):
        for name, spec in self._input_specs.items():
            shape = tuple(inputs[name].shape)
            if shape != tuple(spec.shape):
                raise ValueError(
                    f"Expected `{name}` to have the shape {spec.shape} that "
                    f"the step was made for. Received: shape {shape}."
                )
        cache = tuple(
            tuple(
                State(inputs[f"past_{name}"])
                if isinstance(spec, StateShapes)
                else inputs[f"past_{name}"]
                for name in pair
            )
            for pair, spec in zip(self._names, self._spec)
        )
        x, cache = self._run(
            inputs["token_ids"], cache, inputs["cache_update_index"]
        )
        outputs = {self._output_name: x}
        for names, pair in zip(self._names, cache):
            for name, kept in zip(names, pair):
                tensor = kept.stored if is_state(kept) else kept
                outputs[f"present_{name}"] = tensor
        return {name: outputs[name] for name in self.output_names}

    def _run(self, token_ids, cache, index):
        if self._output_name == "logits":
            x, _, cache = self.model.call_with_cache(token_ids, cache, index)
            return x, cache
        with without_taps():
            return self.model(
                {
                    "token_ids": token_ids,
                    "cache": cache,
                    "cache_update_index": index,
                }
            )

    def export(
        self, filepath, format="tf_saved_model", input_signature=None, **kwargs
    ):
        """Exports the step for inference outside of Keras.

        Args:
            filepath: As for `keras.Model.export()`.
            format: As for `keras.Model.export()`. With the TensorFlow backend
                `"tf_saved_model"`, `"onnx"` and `"litert"` work, with PyTorch
                `"torch"` and `"onnx"`, with JAX `"tf_saved_model"`.
            input_signature: Defaults to `[input_signature]`, the only one that
                the step answers to.
            **kwargs: As for `keras.Model.export()`.
        """
        if input_signature is None:
            input_signature = [self.input_signature]
        super().export(
            filepath, format=format, input_signature=input_signature, **kwargs
        )


def _shapes(spec, max_length):
    """Shapes of what an entry of the cache is, without the batch."""
    if isinstance(spec, StateShapes):
        return spec
    heads, dim = spec
    return [(heads, max_length, dim)] * 2


def _check_length(length, max_length):
    """Raises a `ValueError` unless so many tokens fit into a cache."""
    if not is_int(length) or not 1 <= length <= max_length:
        raise ValueError(
            "Expected `length`, the number of tokens of a call, to be an "
            f"integer from 1 to `max_length`={max_length}. Received: "
            f"{length!r}."
        )
