"""How the decode loop of each backend reads and writes its own cache.

What is made for a text as long as it may become is read as far as it is in use,
and written in place: on PyTorch into the tensors themselves, on JAX and
TensorFlow by the compiler, which sees that nothing else needs the old ones.
"""

import functools
import string

import keras
from keras import ops

from keras_nlp_cache.attention.blockwise import attend_in_blocks
from keras_nlp_cache.attention.by_kernel import attend_by_kernel
from keras_nlp_cache.cache.access import Access
from keras_nlp_cache.cache.access import write_with_jax
from keras_nlp_cache.cache.access import write_with_torch
from keras_nlp_cache.cache.kept import has_policy
from keras_nlp_cache.cache.kept import places
from keras_nlp_cache.cache.slots import is_per_row
from keras_nlp_cache.cache.slots import slots
from keras_nlp_cache.cache.slots import start_at
from keras_nlp_cache.device import constants
from keras_nlp_cache.device import kind
from keras_nlp_cache.drop_in import is_exactly
from keras_nlp_cache.experts.mixture import one_by_one
from keras_nlp_cache.experts.mixture import together
from keras_nlp_cache.generate.loops import alike
from keras_nlp_cache.layers.sharing import share
from keras_nlp_cache.products import logits as own_logits
from keras_nlp_cache.products.multiplying import uses_kernels


def loop_access():
    """The `Access` of loops on this backend."""
    if keras.config.backend() == "torch":
        return TorchAccess()
    if keras.config.backend() == "tensorflow":
        return TensorFlowAccess()
    return JaxAccess()


class LoopAccess(Access):
    """Access for loops: weights are read where they lie, too.

    To look which ones are needed, an accelerator would wait for the host, so
    there they are copied.
    """

    @property
    def most_choices(self):
        return constants().most_choices

    def on_an_accelerator(self):
        """Whether what is computed is computed on something else than a CPU."""
        return kind() != "cpu"

    def logits(self, embedding, hidden_states):
        logits = own_logits.logits(embedding, hidden_states)
        if logits is None:
            return super().logits(embedding, hidden_states)
        return logits

    def attention(self, cache, length):
        attend_filled = self.attend_filled()
        if cache.key is None or attend_filled is None:
            return None
        filled = _filled(cache, length)
        function = functools.partial(attend_filled, filled=filled)
        if not uses_kernels():
            return function
        return functools.partial(
            attend_by_kernel, filled=filled, otherwise=function
        )

    def attend_filled(self):
        """What attends to the first slots of a cache, `filled` of them.

        Returns:
            A function with the arguments of `attend()` and `filled`, or `None`
            for one that reads all slots.
        """
        raise NotImplementedError


class XLAAccess(LoopAccess):
    """Access for loops that XLA compiles.

    On an accelerator each block of slots would wait for the host to say whether
    there is another, and all slots are read.
    """

    def attend_filled(self):
        return None if self.on_an_accelerator() else attend_in_blocks

    def call_block(self, block, call, args, kwargs):
        return alike.call_block(block, call, args, kwargs)

    @property
    def experts(self):
        return None if self.on_an_accelerator() else one_by_one


class JaxAccess(XLAAccess):
    """Access for loops on JAX."""

    def write(self, kept, update, index):
        return write_with_jax(kept, ops.cast(update, kept.dtype), index)

    def put(self, kept, update, where):
        update = ops.cast(update, kept.dtype)
        if where.shape[0] == 1:
            return kept.at[:, :, where[0]].set(update)
        rows = slots(0, kept.shape[0])[0][:, None]
        return kept.at[rows, :, where].set(ops.swapaxes(update, 1, 2))

    def project(self, dense, x):
        # Surgery may have put another layer there.
        if is_exactly(dense, keras.layers.EinsumDense):
            dense = share(dense, equation=in_order_of_kernel(dense.equation))
        return dense(x)


# Up to how many rows, one write for each compiles in no time.
_FEW_ROWS = 16


def _filled(cache, length):
    """How many of the first tokens that attention reads are to be read.

    int32 scalar, of the row that has most.
    """
    index = ops.max(ops.cast(cache.index, "int32"))
    if not has_policy(cache.key):
        return index + length
    count = places(cache.key.stored)
    if length == 1:
        return ops.minimum(index + 1, count)
    return ops.convert_to_tensor(count + length, "int32")


class TensorFlowAccess(XLAAccess):
    """Access for loops on TensorFlow.

    Writes in an operation of XLA's that has no gradient.
    """

    def write(self, kept, update, index):
        update = ops.cast(update, kept.dtype)
        if not is_per_row(index):
            return ops.slice_update(kept, start_at(0, 0, index, 0), update)
        batch, heads, length, _ = update.shape
        if batch > _FEW_ROWS:
            import tensorflow as tf

            indices = tf.stack(
                tf.meshgrid(
                    tf.range(batch),
                    tf.range(heads),
                    tf.range(length),
                    indexing="ij",
                ),
                axis=-1,
            )
            first = ops.cast(index, "int32")[:, None, None, None]
            indices += first * tf.constant([0, 0, 1])
            return tf.tensor_scatter_nd_update(kept, indices, update)
        for row in range(batch):
            kept = ops.slice_update(
                kept,
                start_at(row, 0, index[row], 0),
                update[row : row + 1],
            )
        return kept

    @property
    def experts(self):
        return None if self.on_an_accelerator() else _one_by_one_in_two_rows

    def logits(self, embedding, hidden_states):
        from keras_nlp_cache.generate.loops import tensorflow_products

        logits = own_logits.logits(embedding, hidden_states)
        if logits is not None:
            return logits
        return tensorflow_products.logits(embedding, hidden_states)


def _one_by_one_in_two_rows(formula, hidden_states, chosen):
    # Of one row and a slice, XLA makes one loop that adds up number by number,
    # of two rows a product.
    rows = hidden_states.shape[0]
    if rows == 1:
        hidden_states = ops.concatenate([hidden_states] * 2)
    outputs = one_by_one(formula, hidden_states, chosen, read=_gathered)
    return outputs[:, :rows]


def _gathered(x, expert):
    # Where a slice begins, TensorFlow wants to know when it compiles, and asks
    # XLA whether that is a constant. It evaluates what it depends on, among
    # that the sizes of what `top_k()` returns, which it never set, and aborts
    # the process if memory happens to hold a larger number there.
    return ops.take(x, expert[None], axis=0)


class TorchAccess(LoopAccess):
    """Access for loops on PyTorch."""

    @property
    def experts(self):
        from keras_nlp_cache.experts.torch_product import product

        if self.on_an_accelerator():
            return None
        return functools.partial(together, product=product)

    def write(self, kept, update, index):
        return self.put(kept, update, slots(index, update.shape[2]))

    def put(self, kept, update, where):
        update = ops.cast(update, kept.dtype)
        if kept.shape[0] > 1 and kept.stride(0) == 0:
            # Beams of one prompt, which a sampler repeats without a copy.
            kept = kept.clone()
        return write_with_torch(kept, update, where)

    def replace(self, state, new):
        return state.copy_(new)

    def call_block(self, block, call, args, kwargs):
        return alike.call_block(block, call, args, kwargs)

    def attend_filled(self):
        from keras_nlp_cache.attention.torch_prefix import attend_prefix

        return attend_prefix


def in_order_of_kernel(equation):
    """The same einsum of a dense layer, its axes named as the kernel has them.

    JAX contracts axes in the order of their names. Where the kernel has them in
    another, XLA transposes it, at every decode step.

    Args:
        equation: str, such as `"bquh,uhm->bqm"`.

    Returns:
        str, such as `"deab,abc->dec"`.
    """
    inputs, kernel, _ = equation.replace("->", ",").split(",")
    names = dict.fromkeys(kernel + inputs)
    return equation.translate(
        str.maketrans(dict(zip(names, string.ascii_lowercase)))
    )
