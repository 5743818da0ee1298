"""Devices: a mesh with an axis over the data, for ablations one over runs, too, and how arrays lie on it."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax.core.errors import UserError

DATA = "data"
RUN = "run"
PATIENCE = 280  # seconds for which processes wait for each other in the beginning; jax's own limit is 300


def make(rows: int, devices: int = 0) -> Mesh:
    """A mesh over all devices of all hosts, or the first `devices` of them.

    Args:
        rows: Rows of a global batch; they must divide evenly.
        devices: How many devices to use; 0 for all.

    Raises:
        UserError: There are not so many devices, or the rows do not divide by them.
    """
    chosen = _devices(devices)
    if rows % len(chosen):
        raise UserError(f"batch.rows is {rows}; it must be a multiple of the {len(chosen)} devices")
    # Auto axes: under Explicit ones nn.Embed's look-up is ambiguous and raises.
    return jax.make_mesh((len(chosen),), (DATA,), axis_types=(AxisType.Auto,), devices=chosen)


def make_for_runs(rows: int, runs: int, devices: int = 0, size: int = 0) -> Mesh:
    """A mesh whose first axis is over runs that train side by side, and the second over the rows of their batches.

    Runs need not talk to each other, so they get as many devices as there are runs for; only what is left over shares rows.

    Args:
        rows: Rows of a batch; they must divide by the devices that share them. 0: no batch is put on them.
        runs: How many there are.
        devices: As for make.
        size: How many runs are in one array of an earlier process, copies that fill it up counted: it is cut over as many
            devices as divide it. 0: none was made.

    Raises:
        UserError: As for make.
    """
    chosen = _devices(devices)
    apart = max(n for n in range(1, len(chosen) + 1) if len(chosen) % n == 0 and n <= max(runs, 1) and size % n == 0)
    together = len(chosen) // apart
    if rows % together:
        told = f"batch.rows is {rows}; it must be a multiple of the {together} devices that share a batch"
        begun = f": {size} runs at once were begun, and there are {len(chosen)} devices. Go on with as many devices as before"
        raise UserError(told + begun if size else told)
    return jax.make_mesh((apart, together), (RUN, DATA), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def _devices(count: int) -> list[jax.Device]:
    there = jax.devices()
    if count > len(there):
        raise UserError(f"devices is {count}, but there are {len(there)} ({there[0].platform})")
    if count and jax.process_count() > 1 and count != len(there):
        raise UserError(f"devices is {count}, but {jax.process_count()} processes train together: use all {len(there)} (0)")
    return there[: count or len(there)]


def shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are cut."""
    return mesh.shape[DATA]


def by_runs(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the devices that train different runs."""
    return NamedSharding(mesh, PartitionSpec(RUN))


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


def own_devices(mesh: Mesh) -> list[jax.Device]:
    """Those of the mesh that this process has."""
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def own(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are whole on every device of the mesh, as arrays on this process's devices alone; nothing is copied."""
    if jax.process_count() == 1:
        return tree
    devices = own_devices(mesh)
    here = replicated(jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices))

    def cut(leaf: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        return jax.make_array_from_single_device_arrays(leaf.shape, here, [parts[device] for device in devices])

    return jax.tree.map(cut, tree)


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
        UserError: It is neither. Where not all processes come, this one ends with a line and exit code 2.
    """
    # Jax would end the process itself, with pages of addresses.
    late = threading.Timer(PATIENCE, _end, [f"not all processes of --distributed {cluster} have come within {PATIENCE} s"])
    late.daemon = True
    late.start()
    try:
        _connect(cluster)
    finally:
        late.cancel()


def _end(why: str) -> None:
    print(f"error: {why}; start the same command on every host", file=sys.stderr, flush=True)
    os._exit(2)


def _connect(cluster: str) -> None:
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
