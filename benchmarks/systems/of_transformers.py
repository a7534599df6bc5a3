"""transformers on PyTorch, as it comes and compiled."""

import numpy as np

from benchmarks import kinds
from benchmarks.device import torch_device
from benchmarks.systems.base import System


class Transformers(System):
    """transformers on PyTorch, eager, with its default cache."""

    options = {}

    def __init__(self, preset, dtype, quantize):
        import torch
        import transformers

        self.kind = kinds.of(preset)
        auto_class = getattr(transformers, self.kind.transformers_class)
        model = auto_class.from_pretrained(preset, dtype=getattr(torch, dtype))
        self.model = model.to(torch_device()).eval()

    def generate(self, prompt, new, max_length=None, stop=None):
        import torch

        inputs = self._inputs(prompt, prompt["token_ids"][:, :0])
        with torch.no_grad():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=None if stop is not None else new,
                max_new_tokens=new,
                pad_token_id=0,
                eos_token_id=stop,
                **self.kind.options(),
                **self.options,
            )
        length = inputs[self.kind.transformers_text].shape[1]
        return output[:, length:].numpy(force=True)

    def batch(self, prompts, new):
        import torch

        lengths = np.array([len(x) for x in prompts])
        most = lengths.max()
        mask = np.arange(most) >= most - lengths[:, None]
        token_ids = np.zeros(mask.shape, "int64")
        token_ids[mask] = np.concatenate(prompts)
        with torch.no_grad():
            output = self.model.generate(
                torch.tensor(token_ids, device=torch_device()),
                attention_mask=torch.tensor(
                    mask.astype("int64"), device=torch_device()
                ),
                do_sample=False,
                min_new_tokens=max(new),
                max_new_tokens=max(new),
                pad_token_id=0,
                eos_token_id=None,
                **self.options,
            ).numpy(force=True)
        return [row[most : most + n] for row, n in zip(output, new)]

    def logits(self, prompt, after):
        import torch

        with torch.no_grad():
            logits = self.model(**self._inputs(prompt, after)).logits
        return logits[0].float().numpy(force=True)

    def _inputs(self, prompt, after):
        import torch

        arrays = self.kind.for_transformers(prompt, after)
        return {
            name: torch.tensor(x, device=torch_device())
            for name, x in arrays.items()
        }

    def weight_bytes(self):
        read = self.kind.only_in_steps(self.model.named_parameters())
        sizes = [x.numel() * x.element_size() for x in read]
        return {"bytes": sum(sizes)}


class TransformersCompiled(Transformers):
    """transformers with a static cache and a forward pass that is compiled."""

    options = {"cache_implementation": "static"}

    def __init__(self, preset, dtype, quantize):
        import torch

        super().__init__(preset, dtype, quantize)
        self.model.forward = torch.compile(self.model.forward)
