"""A checkpoint's directory as it is read: the record, and the arrays straight from tensorstore.

Orbax writes them. Reading by its managers needs files that hold no number of the state (shardings, types of containers), starts
hundreds of tasks whose errors nobody collects, and differs between a whole state and its parameters. Here a checkpoint is
readable or it is not, for whoever asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from mtl_jax.core.files import parse_json, reason, to_json
from mtl_jax.core.json_shapes import anything, list_of, mapping, number, object_of, text, whole
from mtl_jax.core.trees import path_name

AT_ONCE = 64  # arrays that are read together

Arrays = dict[str, list[Any]]  # {path: [shape, sum of bits]}

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
# What orbax has beside it of times and kinds; nothing of it is needed.
TIMES = object_of(
    {"item_handlers": mapping(text)},
    init_timestamp_nsecs=whole,
    commit_timestamp_nsecs=whole,
    metrics=mapping(anything),
    performance_metrics=mapping(number),
    custom_metadata=mapping(anything),
)


class Unreadable(Exception):
    """What of a checkpoint cannot be read, in one line."""


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending; orbax puts a checkpoint in its place when it is whole."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether orbax calls a checkpoint so."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside the state.

    Raises:
        Unreadable: It is not there, or not what was written.
    """
    file = folder / "record" / "metadata"
    try:
        record = parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"record/metadata: {reason(error)}") from error
    if problem := RECORD(record):
        raise Unreadable(f"record/metadata: {problem.strip()}")
    found: dict[str, Any] = record
    if found.get("sha256", _digest(found)) != _digest(found):  # earlier versions wrote none
        raise Unreadable("record/metadata: not what was written")
    return found


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a SHA-256 of itself, by which damage is found that is JSON, too; numbers as strict JSON has them."""
    record = parse_json(to_json(record))
    return {**record, "sha256": _digest(record)}


def _digest(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(to_json(rest).encode()).hexdigest()


def read_arrays(folder: Path, arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of all arrays of a state, each compared with what the record says of it.

    Args:
        folder: The checkpoint.
        arrays: Of its record.

    Raises:
        Unreadable: One is missing, damaged, or not the one that was saved.
    """
    # The nodes of orbax's database are kept while reading, so that each is read once.
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": 100_000_000}})
    paths = list(arrays)
    for first in range(0, len(paths), AT_ONCE):
        part = {path: ts.open(_spec(folder, path), context=context, open=True, read=True) for path in paths[first:][:AT_ONCE]}
        started = {path: _result(path, opened).read() for path, opened in part.items()}
        for path, read in started.items():
            array = np.asarray(_result(path, read))
            if [list(array.shape), sum_of(array)] != arrays[path]:
                raise Unreadable(f"{path} is not what was saved")
            yield path, array


def _result(path: str, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, KeyError, NotImplementedError) as error:  # which of them depends on what is damaged
        status = str(error).partition(":")[0]  # such as DATA_LOSS; a long account of the database follows
        raise Unreadable(f"{path} cannot be read: {status[:60]}") from error


def _spec(folder: Path, path: str) -> dict[str, Any]:
    database = {
        "driver": "ocdbt",
        "base": f"file://{folder}/state/",
        "path": path.replace("/", ".") + "/",
        "cache_pool": "cache_pool#nodes",
    }
    return {"driver": "zarr", "kvstore": database, "fill_missing_data_reads": False}


def describe(tree: Mapping[str, Any]) -> Arrays:
    """{path: [shape, sum of bits]} of a tree on devices or hosts. The sum catches damage that decompresses without an error."""
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    sums = np.asarray(_sums([leaf for _, leaf in leaves])).tolist()
    return {path: [list(leaf.shape), total] for (path, leaf), total in zip(leaves, sums, strict=True)}


def sum_of(array: np.ndarray) -> int:
    """The sum of an array's bits, as whole numbers of its width, modulo 2^32. Any single changed word changes it."""
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(array.dtype.itemsize)
    return -1 if width is None else int(np.ascontiguousarray(array).view(width).sum(dtype=np.uint32))


@jax.jit
def _sums(leaves: Sequence[jax.Array]) -> jax.Array:
    """u32[L]: sum_of() of each leaf, on its devices."""
    jnp = jax.numpy

    def bits(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == bool:  # has no bits of its own to reinterpret
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jnp.stack([bits(leaf) for leaf in leaves])
