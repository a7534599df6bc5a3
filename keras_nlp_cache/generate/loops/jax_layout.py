"""Where the arrays of a loop lie, on the devices of a `keras.distribution`.

A cache is split, so that each device holds its share. All that the host reads
is on every device: of an array that is split over the devices of several
processes, no process could read all. Each process then runs the same loop on
the same prompts, and sees the same tokens.
"""

import hashlib

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils


def _layout(shape):
    """The layout of one array of a cache, `None` for one device.

    The batch is split along the distribution's batch axis, the key/value heads
    along the other one, each as far as it can be split evenly.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    mesh, batch_axis = distribution.device_mesh, distribution.batch_dim_name
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    others = [name for name in mesh.axis_names if name != batch_axis]
    axes = [batch_axis, *[None] * (len(shape) - 1)]
    # What a policy keeps besides has no heads.
    if others and len(shape) == 4:
        axes[1] = others[0]
    axes = [
        axis if axis is not None and size % sizes[axis] == 0 else None
        for axis, size in zip(axes, shape)
    ]
    return keras.distribution.TensorLayout(axes, mesh)


def sharded(cache):
    """Lays a cache out over the devices of a `keras.distribution`.

    Args:
        cache: Pairs of arrays `(B, heads, S, head_dim)`, or of what a policy
            keeps.

    Returns:
        The cache, as it is if there is no distribution.
    """

    def shard(x):
        layout = _layout(x.shape)
        if layout is None:
            return x
        return keras.distribution.distribute_tensor(x, layout)

    return jax.tree.map(shard, cache)


def readable(arrays):
    """Has arrays that a function returns lie on every device, as a whole."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return arrays
    return jax.tree.map(
        lambda x: keras.distribution.distribute_tensor(
            x,
            keras.distribution.TensorLayout(
                [None] * x.ndim, distribution.device_mesh
            ),
        ),
        arrays,
    )


def readable_generation(generation):
    """A `Generation` of which the host can read all but the cache."""
    rest = readable(generation._replace(cache=()))
    return rest._replace(cache=sharded(generation.cache))


def new_tensor(shape, dtype):
    """Memory for an array of a cache, on each device for its share."""
    dtype, layout = jax.numpy.dtype(dtype), _layout(shape)
    # JAX would compile what makes zeros, for each shape.
    if layout is None:
        return jax.device_put(np.zeros(shape, dtype), may_alias=False)
    sharding = layout.backend_layout
    share = np.zeros(sharding.shard_shape(tuple(shape)), dtype)
    return jax.make_array_from_single_device_arrays(
        tuple(shape),
        sharding,
        [
            jax.device_put(share, device, may_alias=False)
            for device in sharding.addressable_devices_indices_map(tuple(shape))
        ],
    )


def check_same(arrays):
    """Refuses what is not the same in all processes, if there are several.

    They would compute parts of different texts. All have to call this.

    Args:
        arrays: Any tree. Its NumPy arrays are compared.

    Raises:
        ValueError: If they differ.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    if not distribution.device_mesh.backend_mesh.is_multi_process:
        return
    digest = hashlib.sha256()
    for x in jax.tree.leaves(arrays):
        if isinstance(x, (np.ndarray, np.generic)):
            digest.update(f"{x.shape}{x.dtype}".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
    mine = np.frombuffer(digest.digest(), "uint8")
    all_of_them = multihost_utils.process_allgather(mine)
    if (all_of_them != mine).any():
        raise ValueError(
            "Expected every process to generate from the same prompts, with "
            "the same arguments and seeds. Received: different ones in process "
            f"{jax.process_index()} and in another. Have each run the same "
            "program, on the same files."
        )
