"""transformers on PyTorch, as it comes and compiled."""

import numpy as np

from benchmarks.device import torch_device
from benchmarks.systems.base import System


class Transformers(System):
    """transformers on PyTorch, eager, with its default cache."""

    options = {}

    def __init__(self, preset, dtype, quantize):
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            preset, dtype=getattr(torch, dtype)
        )
        self.model = model.to(torch_device()).eval()

    def generate(self, prompt, new, max_length=None, stop=None):
        import torch

        prompt = torch.tensor(prompt.astype("int64"), device=torch_device())
        with torch.no_grad():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=None if stop is not None else new,
                max_new_tokens=new,
                pad_token_id=0,
                eos_token_id=stop,
                **self.options,
            )
        return output[:, prompt.shape[1] :].numpy(force=True)

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

    def logits(self, tokens):
        import torch

        tokens = torch.tensor([tokens], device=torch_device())
        with torch.no_grad():
            logits = self.model(tokens).logits
        return logits[0].float().numpy(force=True)

    def weight_bytes(self):
        sizes = [x.numel() * x.element_size() for x in self.model.parameters()]
        return {"bytes": sum(sizes)}


class TransformersCompiled(Transformers):
    """transformers with a static cache and a forward pass that is compiled."""

    options = {"cache_implementation": "static"}

    def __init__(self, preset, dtype, quantize):
        import torch

        super().__init__(preset, dtype, quantize)
        self.model.forward = torch.compile(self.model.forward)
