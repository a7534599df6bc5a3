"""Systems that are a `CausalLM` of Keras: ours and upstream's."""

import math
import time

import numpy as np

from benchmarks import kinds
from benchmarks.systems.base import itemsize
from benchmarks.systems.base import System


class KerasSystem(System):
    """A `CausalLM` of Keras, on the backend of `KERAS_BACKEND`."""

    quantizations = ("none", "int8", "int8-weights", "int4", "int4-32")

    def __init__(self, models, preset, dtype, quantize):
        self.kind = kinds.of(preset)
        self.lm = getattr(models, self.kind.keras_task).from_preset(
            preset, preprocessor=None, dtype=dtype
        )
        if quantize != "none":
            self.lm.quantize(**quantization(quantize))
        self.lm.compile(sampler="greedy")

    def generate(self, prompt, new, max_length=None, stop=None):
        batch, length = prompt["token_ids"].shape
        total = max_length or length + new
        room = np.zeros((batch, total - length), "int32")
        output = self.lm.generate(
            self.kind.for_keras(prompt, room, known=False),
            stop_token_ids=None if stop is None else (stop,),
        )
        return output[self.kind.keras_text][:, length : length + new]

    def batch(self, prompts, new):
        lengths = np.array([len(x) for x in prompts])
        total = int((lengths + new).max())
        mask = np.arange(total) < lengths[:, None]
        token_ids = np.zeros(mask.shape, "int32")
        token_ids[mask] = np.concatenate(prompts)
        output = self.lm.generate(
            {"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None
        )["token_ids"]
        return [
            row[length : length + count]
            for row, length, count in zip(output, lengths, new)
        ]

    def logits(self, prompt, after):
        import keras

        inputs = self.kind.for_keras(prompt, after, known=True)
        logits = keras.ops.cast(self.lm(inputs)[0], "float32")
        return keras.ops.convert_to_numpy(logits)

    def weight_bytes(self):
        sizes = [
            math.prod(x.shape) * itemsize(x.dtype)
            for x in self.kind.only_in_steps(
                (x.path, x) for x in self.lm.backbone.weights
            )
        ]
        return {"bytes": sum(sizes)}


class Ours(KerasSystem):
    """keras_nlp_cache."""

    def __init__(self, preset, dtype, quantize):
        from keras_nlp_cache import models

        super().__init__(models, preset, dtype, quantize)

    def rows(self, prompts, new, places):
        requests = [
            {"prompt": prompt, "max_new_tokens": count}
            for prompt, count in zip(prompts, new)
        ]
        return self.lm.generate(
            requests, batch_size=places, stop_token_ids=None, strip_prompt=True
        )

    def step_milliseconds(self, prompt, new, max_length):
        prompt = np.asarray(prompt["token_ids"], "int32")
        loop = self.lm.generation_loop
        generation = loop.prefill(prompt, np.ones_like(prompt), max_length)
        length = prompt.shape[1]
        generation = loop.decode(generation, length + 1)
        np.asarray(generation.token_ids)
        start = time.perf_counter()
        generation = loop.decode(generation, length + 1 + new)
        np.asarray(generation.token_ids)  # JAX does not wait otherwise.
        return {"milliseconds": (time.perf_counter() - start) / new * 1e3}


class InBatches(Ours):
    """keras_nlp_cache, a batch of prompts after the other."""

    def rows(self, prompts, new, places):
        return System.rows(self, prompts, new, places)

    def batch(self, prompts, new):
        return super().rows(prompts, new, places=len(prompts))


class KerasHub(KerasSystem):
    """keras_hub."""

    # It reads the last token of a prompt twice, which changes a state.
    generates_otherwise = ("qwen3_5",)

    def __init__(self, preset, dtype, quantize):
        from keras_hub import models

        super().__init__(models, preset, dtype, quantize)


def quantization(name):
    """What `quantize()` takes for the name of a way to store weights."""
    import keras

    if name == "int8-weights":
        # Without it, what a layer is called on becomes integers, too.
        only = keras.quantizers.Int8QuantizationConfig(
            activation_quantizer=None
        )
        return {"config": only}
    if name == "int4-32":
        # Groups as small as those of GGUF. Keras' own are of 128.
        groups = keras.quantizers.Int4QuantizationConfig(block_size=32)
        return {"config": groups}
    return {"mode": name}
