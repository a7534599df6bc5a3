"""What depends on the device that computes: numbers that were measured.

| constant | CPU | GPU | TPU |
|---|---|---|---|
| `compiled_chunk` | 32, SmolLM2 and GPT-2 on 2 cores | 256, not measured yet | 256, not measured yet |
| `eager_chunk` | 512, for memory to be bounded | 512, not measured yet | 512, not measured yet |
| `small_block` | 128, SmolLM2, a width of 192, on 2 cores | all slots are read | all slots are read |
| `large_block` | 512, GPT-2 at batch 8, a width of 6144, on 2 cores | all slots are read | all slots are read |
| `narrow` | 2048, between GPT-2's 768 and 6144, on 2 cores | all slots are read | all slots are read |
| `most_blocks` | 4, the same models | all slots are read | all slots are read |
| `most_queries` | 16, not measured yet: fewer than a chunk of a prefill | no kernels | no kernels |
| `few_heads` | 8, SmolLM2's 3 at 4000 tokens, on 2 cores | no kernels | no kernels |
| `least_product` | 4096, not measured yet | no kernels | no kernels |
| `piece_bytes` | 65536, 5 microseconds of a core, to wake another takes as long | no kernels | no kernels |
| `most_pieces` | 16, on 2 cores beside a process that burns one | no kernels | no kernels |
| `most_choices` | 4, with more nearly all experts are chosen | 1, not measured yet | 1, not measured yet |

`set_constants()` sets others, for a device that this table does not know:

```python
from keras_nlp_cache import device

device.set_constants(compiled_chunk=64)
device.set_constants()  # Back to what stands in the table.
```
"""  # noqa: E501

import dataclasses

import keras


@dataclasses.dataclass(frozen=True)
class Constants:
    """Numbers that depend on the device.

    Attributes:
        compiled_chunk: int. How many tokens of a prompt a loop reads at once
            that is compiled, or recorded. A prompt fills its last chunk by half
            on average, and one size takes one compilation.
        eager_chunk: int. How many a loop in Python reads at once.
        small_block: int. How many slots of a cache, narrow ones, are attended
            at a time.
        large_block: int. The same of wide ones.
        narrow: int. Numbers per slot, in the keys of all rows and heads, up to
            which a slot is narrow.
        most_blocks: int. In how many blocks a long cache is attended.
        most_queries: int. Up to how many queries that share keys our own kernel
            attends with. Products of a backend read a key once for many.
        few_heads: int. Fewer key/value heads than these, in all rows, would
            leave cores with nothing to do: then each query head reads its keys
            by itself.
        least_product: int. How many numbers a weight has at least that our own
            kernel multiplies with. Of smaller ones, a call costs more than
            what is saved.
        piece_bytes: int. How many bytes a thread reads of what a kernel reads,
            before it looks for more.
        most_pieces: int. Into how many such pieces a job is divided at most.
        most_choices: int. How often tokens may choose experts, for each expert
            there is, for it to be quicker to compute those that were chosen.
    """

    compiled_chunk: int
    eager_chunk: int = 512
    small_block: int = 128
    large_block: int = 512
    narrow: int = 2048
    most_blocks: int = 4
    most_queries: int = 16
    few_heads: int = 8
    least_product: int = 4096
    piece_bytes: int = 64 * 1024
    most_pieces: int = 16
    most_choices: int = 1


TABLE = {
    "cpu": Constants(compiled_chunk=32, most_choices=4),
    "gpu": Constants(compiled_chunk=256),
    "tpu": Constants(compiled_chunk=256),
}

_chosen = {}


def set_constants(**values):
    """Sets constants in place of those of the device, for all models.

    What was compiled with others is compiled again.

    Args:
        **values: Attributes of `Constants`. Those that are not named are those
            of the device again.

    Raises:
        ValueError: If there is no such constant, or if one is no positive int.
    """
    names = [field.name for field in dataclasses.fields(Constants)]
    for name, value in values.items():
        if name not in names:
            raise ValueError(
                f"Expected one of {', '.join(names)}. Received: {name!r}."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"Expected `{name}` to be a positive integer. Received: "
                f"{value!r}."
            )
    _chosen.clear()
    _chosen.update(values)


def constants():
    """The `Constants` of the device that computes, or those that were set."""
    return dataclasses.replace(TABLE[kind()], **_chosen)


def kind():
    """The device that computes: `"cpu"`, `"gpu"` or `"tpu"`."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        name = jax.default_backend()
    elif backend == "tensorflow":
        import tensorflow as tf

        kinds = {x.device_type for x in tf.config.list_logical_devices()}
        name = next((x for x in ("TPU", "GPU") if x in kinds), "CPU").lower()
    elif backend == "torch":
        from keras.src.backend.torch.core import get_device

        name = get_device()
    else:
        name = "cpu"
    if name in TABLE:
        return name
    return "tpu" if name == "xla" else "gpu"
