"""Devices: meshes with an axis over rows, and for ablations one over runs; how arrays lie on them; several processes."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import clusters  # jax has no public access to what it finds
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.training import lost_hosts

DATA = "data"
RUN = "run"
CONNECT_WITHIN = 280  # seconds in which all processes of a run must start; jax's own limit is 300


def make(rows: int, devices: int = 0) -> Mesh:
    """A mesh over all devices of all hosts, or the first `devices` of them.

    Args:
        rows: Rows of a global batch; they must divide evenly.
        devices: How many devices to use; 0 for all.

    Raises:
        UserError: There are fewer devices, or the rows do not divide by them.
    """
    chosen = _devices(devices)
    if rows % len(chosen):
        raise UserError(f"batch.rows is {rows}; it must be a multiple of the {len(chosen)} devices")
    # Auto axes: under Explicit ones the indexing of nn.Embed is ambiguous and raises.
    return jax.make_mesh((len(chosen),), (DATA,), axis_types=(AxisType.Auto,), devices=chosen)


def make_for_runs(rows: int, runs: int, devices: int = 0, size: int = 0) -> Mesh:
    """A mesh with a first axis over runs that are trained at once, and a second one over the rows of their batches.

    Runs exchange nothing, so as many devices as possible train different runs; only the remaining factor shares rows.

    Args:
        rows: Rows of a batch; they must divide by the devices that share them. 0: no batch is put on them.
        runs: The number of runs.
        devices: As for make.
        size: The number of runs in the arrays of an earlier process, with the copies that fill them up: they are cut over a
            number of devices that divides it. 0: there are none.

    Raises:
        UserError: As for make.
    """
    chosen = _devices(devices)
    over_runs = max(n for n in range(1, len(chosen) + 1) if len(chosen) % n == 0 and n <= max(runs, 1) and size % n == 0)
    over_rows = len(chosen) // over_runs
    if rows % over_rows:
        problem = f"batch.rows is {rows}; it must be a multiple of the {over_rows} devices that share a batch"
        resumed = (
            f": {size} runs were begun at once, and there are {len(chosen)} devices. Resume with as many devices as before"
        )
        raise UserError(problem + resumed if size else problem)
    return jax.make_mesh((over_runs, over_rows), (RUN, DATA), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def _devices(count: int) -> list[jax.Device]:
    devices = jax.devices()
    if count > len(devices):
        raise UserError(f"devices is {count}, but there are {len(devices)} ({devices[0].platform})")
    if count and jax.process_count() > 1 and count != len(devices):
        raise UserError(f"devices is {count}, but {jax.process_count()} processes train together: use all {len(devices)} (0)")
    return devices[: count or len(devices)]


def shards(mesh: Mesh) -> int:
    """The number of devices that share the rows of a batch."""
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


def in_shares(mesh: Mesh, leaf: jax.Array, axes: Sequence[int]) -> jax.Array:
    """An array of which every device that shares rows has a part; as it is, where no axis can be cut.

    Args:
        mesh: The devices.
        leaf: The array.
        axes: The axes that may be cut; the first one that divides is, as the parts of an outer axis lie in one piece.
    """
    axis = next((axis % leaf.ndim for axis in axes if leaf.shape[axis] % shards(mesh) == 0), None)
    if axis is None:
        return leaf
    # Whole first: else the compiler cuts the program that makes the array in the same way, which costs more than it saves.
    whole = jax.lax.with_sharding_constraint(leaf, replicated(mesh))
    return jax.lax.with_sharding_constraint(whole, by_rows(mesh, axis))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays to device arrays of the same shape. Every host has the whole array and copies the part of its devices."""

    def put(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(put, tree)


def assemble(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays to device arrays of the rows of all hosts. Every host has its own rows, as many as each other one."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: np.ndarray) -> jax.Array:
        shape = (len(leaf) * jax.process_count(), *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(put, tree)


def local_devices(mesh: Mesh) -> list[jax.Device]:
    """The devices of the mesh that belong to this process."""
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def to_local_devices(tree: Any, mesh: Mesh) -> Any:
    """Replicated arrays as arrays on this process's devices alone; nothing is copied."""
    if jax.process_count() == 1:
        return tree
    devices = local_devices(mesh)
    sharding = replicated(jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices))

    def cut(leaf: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [parts[device] for device in devices])

    return jax.tree.map(cut, tree)


def gather(value: Any) -> list[Any]:
    """The JSON-able values of all hosts, on every host."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(encoded)])))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(np.asarray(rows), lengths, strict=True)]


def from_host_0(value: bool) -> bool:
    """Host 0's value, on every host: collective work needs the same decision on all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def connect(cluster: str) -> None:
    """Connects this process to the others of a run: jax.distributed.initialize.

    Args:
        cluster: "auto" (a TPU pod, Slurm, Open MPI, Kubernetes), or "HOST:PORT,INDEX,COUNT": the address of process 0, this
            process's index from 0, and the number of processes.

    Raises:
        UserError: `cluster` is neither. Where a process does not start, this one ends with a line and exit code 2.
    """
    # Jax would end the process itself, and print pages of addresses.
    late = threading.Timer(
        CONNECT_WITHIN, _end, [f"not all processes of --distributed {cluster} have started within {CONNECT_WITHIN} s"]
    )
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
            jax.distributed.initialize(heartbeat_timeout_seconds=lost_hosts.HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--distributed auto: jax found no cluster ({str(error).splitlines()[0]})") from error
        lost_hosts.watch()
        return
    address, index, count = _given(cluster)
    jax.distributed.initialize(
        address,
        process_id=index,
        num_processes=count,
        cluster_detection_method="deactivate",  # else a process sees one device only, where the cluster is Slurm
        heartbeat_timeout_seconds=lost_hosts.HEARTBEAT,
    )
    lost_hosts.watch()


def _given(cluster: str) -> tuple[str, int, int]:
    """The address of process 0, this process's index, and the number of processes."""
    address, *numbers = cluster.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or ":" not in address:
        raise UserError(f"--distributed {cluster!r}: give auto, or HOST:PORT,INDEX,COUNT")
    return address, int(numbers[0]), int(numbers[1])


def process_of(cluster: str) -> tuple[int, int]:
    """The index of this process and the number of processes, without connecting them.

    Args:
        cluster: As for connect.

    Raises:
        UserError: As connect.
    """
    if cluster != "auto":
        return _given(cluster)[1:]
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    _, count, index, _ = detect("localhost:0", None, None, [0], None, CONNECT_WITHIN)
    if index is None or count is None:
        raise UserError("--distributed auto: jax found no cluster; give HOST:PORT,INDEX,COUNT")
    return index, count


def compute_dtype(name: str) -> Any:
    """The dtype of a name; of auto bfloat16 on accelerators, float32 on CPU.

    Raises:
        UserError: There is no such dtype.
    """
    if name == "auto":
        return np.float32 if jax.devices()[0].platform == "cpu" else jax.numpy.bfloat16
    dtypes = {"float32": np.float32, "bfloat16": jax.numpy.bfloat16}
    if name not in dtypes:
        raise unknown("dtype", name, ["auto", *dtypes])
    return dtypes[name]


def bytes_of(compiled: Any) -> int:
    """Bytes that a compiled program needs on a device: arguments, results and temporary buffers."""
    stats = compiled.memory_analysis()
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(kept + stats.temp_size_in_bytes)
