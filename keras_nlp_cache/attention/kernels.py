"""Attention of a few new tokens to a cache, by kernels of our own on a CPU.

What the backends bring copies or widens a block of the cache before it
multiplies it, and reads what masks hide. A kernel reads each key and value that
is seen once, where it lies, in whatever dtype, and nothing else.

A piece of a job are some of the query heads of some rows. Those that one
key/value head serves are together, unless there would be too few pieces.
"""

import numba
import numpy as np
from numba import carray

from keras_nlp_cache.cache.masks import MASKED
from keras_nlp_cache.kernels import floats
from keras_nlp_cache.kernels import jobs
from keras_nlp_cache.kernels.exponential import exp
from keras_nlp_cache.kernels.kernel import Kernel
from keras_nlp_cache.kernels.machine_words import from_bfloat16
from keras_nlp_cache.kernels.machine_words import from_float16
from keras_nlp_cache.kernels.machine_words import pointer
from keras_nlp_cache.kernels.machine_words import words

# Arguments. Keys and values are `(B, heads, S, head_dim)`, queries and what is
# computed `(B, T, heads * groups, head_dim)`, the mask float32
# `(B or 1, 1 or heads * groups, T, S)`, how many slots are filled an int32.
QUERY, KEY, VALUE, MASK, FILLED, SINK, KEY_SCALE, VALUE_SCALE = range(
    jobs.ARGUMENTS, jobs.ARGUMENTS + 8
)
# Sizes. `TOGETHER` query heads read what they attend to at once. A cap of 0 is
# none. `DTYPE` is that of queries and of what is computed.
(
    ROWS,
    HEADS,
    GROUPS,
    LENGTH,
    SLOTS,
    HEAD_DIM,
    MASK_ROWS,
    MASK_HEADS,
    TOGETHER,
    SCALE_BITS,
    CAP_BITS,
    DTYPE,
) = range(jobs.SIZES, jobs.SIZES + 12)

_HIDDEN = np.float32(MASKED / 2)
_LOWEST = np.finfo(np.float32).min


@numba.njit
def _float32(x):
    return np.float32(x)


@numba.njit
def _capped(x, cap):
    """`cap * tanh(x / cap)` of a float32."""
    e = exp(np.float32(-2) * abs(x) / cap)
    y = cap * (np.float32(1) - e) / (np.float32(1) + e)
    return y if x > 0 else -y


@numba.njit(fastmath=True)
def _softmax(logits, first, count, sink, has_sink):
    """Replaces logits, those from `first` on, by weights."""
    largest = _LOWEST
    for s in range(first, count):
        largest = max(largest, logits[s])
    if largest <= _HIDDEN:
        # All are hidden, which is not to be weighed as if all were alike.
        for s in range(first, count):
            logits[s] = 0
        return
    if has_sink:
        largest = max(largest, sink)
    total = np.float32(0)
    for s in range(first, count):
        weight = exp(logits[s] - largest)
        logits[s] = weight
        total += weight
    if has_sink:
        total += exp(sink - largest)
    scale = np.float32(1) / total
    for s in range(first, count):
        logits[s] *= scale


@numba.njit
def _optional(address, at, count):
    """Some float32 from an address on, none if it is 0."""
    if address == 0:
        return np.zeros(0, np.float32)
    return carray(pointer(address + 4 * at), count, np.float32)


def _attention(name, wide, dtype, size):
    """Code for attention to a dtype of some size, widened by `wide()`.

    Each has a name of its own, as it is found by name in what is kept on disk.
    """

    def dots(q, k, s, out):
        """Products of a query with four keys."""
        a, b, c, d = (
            np.float32(0),
            np.float32(0),
            np.float32(0),
            np.float32(0),
        )
        k0, k1, k2, k3 = k[s], k[s + 1], k[s + 2], k[s + 3]
        for i in range(q.shape[0]):
            x = q[i]
            a += x * wide(k0[i])
            b += x * wide(k1[i])
            c += x * wide(k2[i])
            d += x * wide(k3[i])
        out[s], out[s + 1], out[s + 2], out[s + 3] = a, b, c, d

    def dot(q, k):
        a = np.float32(0)
        for i in range(q.shape[0]):
            a += q[i] * wide(k[i])
        return a

    def add(y, v, s, w):
        """Adds four values, each with its weight."""
        a, b, c, d = w[s], w[s + 1], w[s + 2], w[s + 3]
        v0, v1, v2, v3 = v[s], v[s + 1], v[s + 2], v[s + 3]
        for i in range(y.shape[0]):
            y[i] += (
                a * wide(v0[i])
                + b * wide(v1[i])
                + c * wide(v2[i])
                + d * wide(v3[i])
            )

    def add_one(y, v, w):
        for i in range(y.shape[0]):
            y[i] += w * wide(v[i])

    def compile(function, suffix):
        function.__name__ = function.__qualname__ = f"{name}_{suffix}"
        return numba.njit(fastmath=True)(function)

    dots, dot = compile(dots, "dots"), compile(dot, "dot")
    add, add_one = compile(add, "add"), compile(add_one, "add_one")

    def attend(
        q, k, v, mask, at, filled, sink, k_scale, v_scale, scale, cap, y, logits
    ):
        """Attends with `(R, D)` queries to `(S, D)` keys and values.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            mask: Of all rows, `(any, S)`.
            at: `(R,)`. Which row of the mask is whose.
            filled: int. How many slots to look at.
            sink: `(R,)`, or of no numbers.
            k_scale: `(S,)`, or of no numbers.
            v_scale: `(S,)`, or of no numbers.
            scale: What logits are multiplied with.
            cap: What bounds them, 0 if nothing does.
            y: `(R, D)`, zeros, what is computed.
            logits: `(R, S)`, memory to use.
        """
        count = q.shape[0]
        # What no query sees at either end is not looked at.
        first, last = filled, 0
        for r in range(count):
            hidden = mask[at[r]]
            for s in range(first):
                if hidden[s] > _HIDDEN:
                    first = s
                    break
            for s in range(filled - 1, last - 1, -1):
                if hidden[s] > _HIDDEN:
                    last = s + 1
                    break
        if first >= last:
            return
        fours = last - (last - first) % 4
        for s in range(first, fours, 4):
            for r in range(count):
                dots(q[r], k, s, logits[r])
        for s in range(fours, last):
            for r in range(count):
                logits[r, s] = dot(q[r], k[s])
        for r in range(count):
            row, hidden = logits[r], mask[at[r]]
            for s in range(first, last):
                row[s] *= scale
            if k_scale.size:
                for s in range(first, last):
                    row[s] *= k_scale[s]
            if cap > 0:
                for s in range(first, last):
                    row[s] = _capped(row[s], cap)
            for s in range(first, last):
                row[s] += hidden[s]
            own_sink = sink[r] if sink.size else np.float32(0)
            _softmax(row, first, last, own_sink, sink.size > 0)
            if v_scale.size:
                for s in range(first, last):
                    row[s] *= v_scale[s]
        for s in range(first, fours, 4):
            for r in range(count):
                add(y[r], v, s, logits[r])
        for s in range(fours, last):
            for r in range(count):
                add_one(y[r], v[s], logits[r, s])

    attend = compile(attend, "attend")

    def attend_units(job, piece):
        """Computes a piece of a job."""
        q = words(job, jobs.WORDS)
        rows, heads, groups = q[ROWS], q[HEADS], q[GROUPS]
        length, slots, head_dim = q[LENGTH], q[SLOTS], q[HEAD_DIM]
        all_heads = heads * groups
        bits = carray(pointer(job + 8 * SCALE_BITS), 2, np.float64)
        scale, cap = np.float32(bits[0]), np.float32(bits[1])
        filled = min(slots, carray(pointer(q[FILLED]), 1, np.int32)[0])
        dtype_of_x = q[DTYPE]
        mask_rows, mask_heads = q[MASK_ROWS], q[MASK_HEADS]
        shape = mask_rows * mask_heads * length, slots
        mask = carray(pointer(q[MASK]), shape, np.float32)
        sinks = _optional(q[SINK], 0, all_heads)

        together = q[TOGETHER]
        count = length * together
        x = np.empty((count, head_dim), np.float32)
        y = np.empty((count, head_dim), np.float32)
        sink = np.empty(count if sinks.size else 0, np.float32)
        logits = np.empty((count, slots), np.float32)
        at = np.empty(count, np.int64)
        row_units = all_heads // together
        units = rows * row_units
        for unit in range(
            piece * units // q[jobs.PIECES],
            (piece + 1) * units // q[jobs.PIECES],
        ):
            row, first_head = unit // row_units, unit % row_units * together
            for t in range(length):
                for g in range(together):
                    r, query_head = t * together + g, first_head + g
                    head = (row * length + t) * all_heads + query_head
                    place = floats.address_of(
                        q[QUERY], dtype_of_x, head * head_dim
                    )
                    floats.read(place, dtype_of_x, x[r])
                    mask_row = row if mask_rows > 1 else 0
                    mask_head = query_head if mask_heads > 1 else 0
                    at[r] = (mask_row * mask_heads + mask_head) * length + t
                    if sinks.size:
                        sink[r] = sinks[query_head]
            y[:] = 0
            begin = (row * heads + first_head // groups) * slots
            place, shape = begin * head_dim * size, (slots, head_dim)
            attend(
                x,
                carray(pointer(q[KEY] + place), shape, dtype),
                carray(pointer(q[VALUE] + place), shape, dtype),
                mask,
                at,
                filled,
                sink,
                _optional(q[KEY_SCALE], begin, slots),
                _optional(q[VALUE_SCALE], begin, slots),
                scale,
                cap,
                y,
                logits,
            )
            for t in range(length):
                for g in range(together):
                    head = (row * length + t) * all_heads + first_head + g
                    place = floats.address_of(
                        q[jobs.RESULT], dtype_of_x, head * head_dim
                    )
                    floats.write(place, dtype_of_x, y[t * together + g])

    return compile(attend_units, "units")


_to_float32s = _attention("attention_to_float32s", _float32, np.float32, 4)
_to_bfloat16s = _attention(
    "attention_to_bfloat16s", from_bfloat16, np.uint16, 2
)
_to_float16s = _attention("attention_to_float16s", from_float16, np.uint16, 2)
_to_int8s = _attention("attention_to_int8s", _float32, np.int8, 1)


# Code that calls itself what it computes is loaded from disk, code that was
# given what to call is not.
def _float32_attention(job, piece):
    _to_float32s(job, piece)


def _bfloat16_attention(job, piece):
    _to_bfloat16s(job, piece)


def _float16_attention(job, piece):
    _to_float16s(job, piece)


def _int8_attention(job, piece):
    _to_int8s(job, piece)


# By the dtype of keys and values.
KERNELS = {
    "float32": Kernel(8, _float32_attention),
    "bfloat16": Kernel(9, _bfloat16_attention),
    "float16": Kernel(10, _float16_attention),
    "int8": Kernel(11, _int8_attention),
}
