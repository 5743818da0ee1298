"""Devices: a mesh with one axis over the data, and how arrays lie on it."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax.errors import UserError

DATA = "data"


def make(rows: int, devices: int = 0) -> Mesh:
    """A mesh over all devices of all hosts, or the first `devices` of them.

    Args:
        rows: Rows of a global batch; they must divide evenly.
        devices: How many devices to use; 0 for all.

    Raises:
        UserError: There are not so many devices, or the rows do not divide by them.
    """
    there = jax.devices()
    if devices > len(there):
        raise UserError(f"devices is {devices}, but there are {len(there)} ({there[0].platform})")
    if devices and jax.process_count() > 1 and devices != len(there):
        raise UserError(f"devices is {devices}, but {jax.process_count()} processes train together: use all {len(there)} (0)")
    chosen = there[: devices or len(there)]
    if rows % len(chosen):
        raise UserError(f"batch.rows is {rows}; it must be a multiple of the {len(chosen)} devices")
    # Auto axes: under Explicit ones nn.Embed's look-up is ambiguous and raises.
    return jax.make_mesh((len(chosen),), (DATA,), axis_types=(AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device: parameters, optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis cut over the devices: the rows of batches."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays to device arrays of the global shape. Every host holds the whole array and gives its own part."""

    def put(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(put, tree)


def assemble(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays to device arrays; every host gives its own rows, as many as the others."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: np.ndarray) -> jax.Array:
        shape = (len(leaf) * jax.process_count(), *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(put, tree)


def gather(value: Any) -> list[Any]:
    """The JSON-able values of all hosts, on every host."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(own)])))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(np.asarray(rows), lengths, strict=True)]


def agreed(value: bool) -> bool:
    """What host 0 says: for decisions about collective work, which all hosts must take alike."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def connect(cluster: str) -> None:
    """Joins this process to the others of a run: jax.distributed.initialize.

    Args:
        cluster: "auto" (a TPU pod, Slurm, Open MPI, Kubernetes), or "HOST:PORT,INDEX,COUNT": the address of process 0, this
            process's index from 0, and the number of processes.

    Raises:
        UserError: It is neither.
    """
    if cluster == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--distributed auto: jax found no cluster here ({str(error).splitlines()[0]})") from error
        return
    address, *numbers = cluster.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or ":" not in address:
        raise UserError(f"--distributed {cluster!r}: give auto, or HOST:PORT,INDEX,COUNT")
    jax.distributed.initialize(address, process_id=int(numbers[0]), num_processes=int(numbers[1]))


def compute_dtype(name: str) -> Any:
    """auto: bfloat16 on accelerators, float32 on CPU; or a dtype by name."""
    if name == "auto":
        return np.float32 if jax.devices()[0].platform == "cpu" else jax.numpy.bfloat16
    return {"float32": np.float32, "bfloat16": jax.numpy.bfloat16}[name]
