"""llama.cpp, as `llama-cpp-python` builds it."""

import os
import pathlib
import sys
import tempfile

import numpy as np

from benchmarks import gguf_file
from benchmarks.systems.base import System

# What ggml calls `GGML_LOG_LEVEL_ERROR`.
_ERROR = 4
MODULE = "llama_cpp"
MISSING = (
    "llama_cpp needs the package llama-cpp-python, which takes a C++ compiler "
    "and some minutes to build: pip install -c constraints.txt -e "
    "'.[llama-cpp]'"
)


class LlamaCpp(System):
    """llama.cpp on the same weights, keys and values in the same dtype.

    Greedy tokens are the largest logits, by NumPy: all that Python does in a
    step, besides, is to fill in a token for each row.
    """

    quantizations = ("none", *gguf_file.QUANTIZED)
    # It looks GELU up in a table of half precision, whatever the weights are.
    tie = 1e-2

    def __init__(self, preset, dtype, quantize):
        import gguf
        import llama_cpp

        self.lib = llama_cpp
        # Kept here, since C calls it as long as the process lives.
        self.log = llama_cpp.llama_log_callback(_say_errors)
        llama_cpp.llama_log_set(self.log, None)
        self.dtype = dtype
        stored = gguf_file.FLOATS[dtype]
        self.cache_type = int(gguf.GGMLQuantizationType[stored])
        params = llama_cpp.llama_model_default_params()
        # So that peak memory is that of the weights, not of pages of a file.
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.gguf")
            gguf_file.write(path, preset, dtype, quantize)
            self.model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), params
            )
        if not self.model:
            raise SystemExit("llama.cpp did not load what is said above.")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.shape, self.context, self.step = None, None, None

    def weight_bytes(self):
        return {"bytes": int(self.lib.llama_model_size(self.model))}

    def generate(self, prompt, new, max_length=None, stop=None):
        rows = self._rows(
            prompt["token_ids"].tolist(),
            [new] * len(prompt["token_ids"]),
            max_length or 0,
            stop,
        )
        tokens = np.zeros((len(rows), new), "int32")
        for row, found in zip(tokens, rows):
            row[: len(found)] = found
        return tokens

    def batch(self, prompts, new):
        return self._rows(prompts, new)

    def logits(self, prompt, after):
        tokens = [*prompt["token_ids"][0].tolist(), *after[0].tolist()]
        self._make_ready(1, len(tokens), len(tokens))
        everywhere = [(0, i, token, True) for i, token in enumerate(tokens)]
        return self._decode(everywhere).copy()

    def _rows(self, prompts, new, max_length=0, stop=None):
        """Greedy tokens of each prompt, all of them in one step."""
        longest = max(len(x) + n for x, n in zip(prompts, new))
        read = sum(len(x) for x in prompts)
        self._make_ready(len(prompts), max(longest, max_length), read)
        found = [[] for _ in prompts]
        going = list(range(len(prompts)))
        tokens = [
            (row, at, token, at == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        while going:
            chosen = self._decode(tokens).argmax(axis=1).tolist()
            for row, token in zip(going, chosen):
                found[row].append(token)
            going = [
                row
                for row in going
                if len(found[row]) < new[row] and found[row][-1] != stop
            ]
            tokens = [
                (
                    row,
                    len(prompts[row]) + len(found[row]) - 1,
                    found[row][-1],
                    True,
                )
                for row in going
            ]
        return found

    def _make_ready(self, rows, length, tokens):
        """Has an empty cache for texts of a length, and room for a call."""
        shape = rows, length, tokens
        if shape == self.shape:
            memory = self.lib.llama_get_memory(self.context)
            self.lib.llama_memory_clear(memory, True)
            return
        if self.context:
            self.lib.llama_batch_free(self.step)
            self.lib.llama_free(self.context)
        params = self.lib.llama_context_default_params()
        params.n_seq_max = rows
        params.n_ctx = rows * length
        params.n_batch = max(tokens, rows)
        params.n_threads = params.n_threads_batch = os.cpu_count()
        if self.dtype == "float32":
            # Its flash attention computes with half precision.
            params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = self.cache_type
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no context, as is said above.")
        self.step = self.lib.llama_batch_init(params.n_batch, 0, 1)
        self.shape = shape

    def _decode(self, tokens):
        """Logits of those of `(row, position, token, wanted)` that want any."""
        step = self.step
        step.n_tokens = len(tokens)
        for i, (row, position, token, wanted) in enumerate(tokens):
            step.token[i] = token
            step.pos[i] = position
            step.n_seq_id[i] = 1
            step.seq_id[i][0] = row
            step.logits[i] = wanted
        status = self.lib.llama_decode(self.context, step)
        if status:
            raise SystemExit(f"llama.cpp failed with status {status}.")
        logits = self.lib.llama_get_logits(self.context)
        shape = sum(wanted for *_, wanted in tokens), self.vocabulary_size
        return np.ctypeslib.as_array(logits, shape)


def _say_errors(level, text, _):
    """Leaves out what llama.cpp says of hundreds of tensors."""
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)
