"""The directory of one checkpoint: its record, and its arrays, read straight from tensorstore and compared with the record.

Orbax writes them. Reading by its managers needs files that hold no number of the state (shardings, types of containers), starts
hundreds of tasks whose errors nobody collects, and differs between a whole state and its parameters. The functions here need
the record and the arrays only, and raise Damaged for everything that cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from mtl_jax.core import digests
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import parse_json, reason, to_json
from mtl_jax.core.json_shapes import anything, list_of, mapping, number, object_of, text, whole
from mtl_jax.core.trees import path_name

Arrays = dict[str, list[Any]]  # {path: [shape, sum of bits]}

ARRAYS_AT_ONCE = 64  # arrays that are read together

RECORD = object_of(
    {"arrays": mapping(list_of(anything))},
    step=whole,
    counts=object_of({"phase": whole, "places": whole, "seen": mapping(list_of(whole)), "seconds": number}),
    dev=mapping(number, none=True),
    left_out=mapping(text),
    data=anything,
    references=anything,
    fates=list_of(anything),
)


class Damaged(UserError):
    """A checkpoint that cannot be used."""


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending. Orbax gives a checkpoint its name when all of it is written.

    Args:
        folder: The directory of all checkpoints.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether orbax names a checkpoint so."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside the state.

    Args:
        folder: The checkpoint.

    Raises:
        Damaged: It is missing, or not what was written.
    """
    try:
        record = parse_json((folder / "record" / "metadata").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"record/metadata: {reason(error)}") from error
    if problem := RECORD(record):
        raise _damaged(folder, f"record/metadata: {problem.strip()}")
    checked: dict[str, Any] = record
    if checked.get("sha256", _digest(checked)) != _digest(checked):  # earlier versions wrote none
        raise _damaged(folder, "record/metadata: not what was written")
    return checked


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own SHA-256, which shows damage that leaves valid JSON; its numbers as strict JSON writes them."""
    record = parse_json(to_json(record))
    return {**record, "sha256": _digest(record)}


def _digest(record: dict[str, Any]) -> str:
    unsigned = {name: value for name, value in record.items() if name != "sha256"}
    return digests.of_bytes(to_json(unsigned).encode())


def read_arrays(folder: Path, arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of all arrays of a state, each compared with its shape and sum in the record.

    Args:
        folder: The checkpoint.
        arrays: The record's.

    Raises:
        Damaged: An array is missing, damaged, or not the one that was saved.
    """
    # The cache keeps the nodes of orbax's database while arrays are read, so that each node is read once.
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": 100_000_000}})
    paths = list(arrays)
    for start in range(0, len(paths), ARRAYS_AT_ONCE):
        part = paths[start : start + ARRAYS_AT_ONCE]
        opened = {path: ts.open(_spec(folder, path), context=context, open=True, read=True) for path in part}
        reads = {path: _result(folder, path, store).read() for path, store in opened.items()}
        for path, read in reads.items():
            array = np.asarray(_result(folder, path, read))
            if [list(array.shape), sum_of(array)] != arrays[path]:
                raise _damaged(folder, f"{path} is not what was saved")
            yield path, array


def _result(folder: Path, path: str, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, KeyError, NotImplementedError) as error:  # which of them depends on what is damaged
        status = str(error).partition(":")[0]  # such as DATA_LOSS; a long account of the database follows
        raise _damaged(folder, f"{path} cannot be read: {status[:60]}") from error


def _spec(folder: Path, path: str) -> dict[str, Any]:
    database = {
        "driver": "ocdbt",
        "base": f"file://{folder}/state/",
        "path": path.replace("/", ".") + "/",
        "cache_pool": "cache_pool#nodes",
    }
    return {"driver": "zarr", "kvstore": database, "fill_missing_data_reads": False}


def _damaged(folder: Path, problem: str) -> Damaged:
    return Damaged(f"checkpoint {folder} is damaged ({problem.splitlines()[0][:200]})")


def describe(tree: Mapping[str, Any]) -> Arrays:
    """{path: [shape, sum of bits]} of a tree on devices or hosts. The sum shows damage that decompresses without an error."""
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    arrays = [leaf for _, leaf in leaves]
    if all(map(_in_host_memory, arrays)):  # where a program over all leaves would take seconds to compile
        sums = [sum_of(np.asarray(leaf if isinstance(leaf, np.ndarray) else leaf.addressable_data(0))) for leaf in arrays]
    else:
        sums = np.asarray(_sums(arrays)).tolist()
    return {path: [list(leaf.shape), total] for (path, leaf), total in zip(leaves, sums, strict=True)}


def sum_of(array: np.ndarray) -> int:
    """The sum of an array's bits, as unsigned integers of its width, modulo 2^32. Any single changed word changes it."""
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(array.dtype.itemsize)
    return -1 if width is None else int(np.ascontiguousarray(array).view(width).sum(dtype=np.uint32))


def _in_host_memory(leaf: jax.Array | np.ndarray) -> bool:
    """Whether the host can read an array where it lies: one of NumPy, or a whole one on a CPU device."""
    if isinstance(leaf, np.ndarray):
        return True
    return leaf.is_fully_replicated and all(device.platform == "cpu" for device in leaf.devices())


@jax.jit
def _sums(leaves: Sequence[jax.Array]) -> jax.Array:
    """u32[L]: sum_of() of each leaf, on its devices."""
    jnp = jax.numpy

    def bits(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == bool:  # bitcast_convert_type refuses bool
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([bits(leaf) for leaf in leaves])
