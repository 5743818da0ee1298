"""A kernel over the rows of a batch that several devices share: each device runs it on its own rows.

XLA cannot divide a kernel of ours among devices, as it does its own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

# (function of arrays with leading axis B to arrays with leading axis B) -> the same over all devices; a number behind the
# function says how many of its last arguments are the same for all rows.
OverRows = Callable[..., Callable[..., Any]]


def on_one_device(function: Callable[..., Any], same: int = 0) -> Callable[..., Any]:
    """The OverRows of one device."""
    return function


def over_rows_of(mesh: Mesh) -> OverRows:
    """How a kernel runs on the devices of a mesh: each on its own rows, along the axis "data"."""
    axis = "data"
    devices = mesh.shape[axis]

    def over_rows(function: Callable[..., Any], same: int = 0) -> Callable[..., Any]:
        if mesh.size == 1 or axis in jax.sharding.get_abstract_mesh().manual_axes:
            return function
        whole = PartitionSpec()

        def call(*arrays: jax.Array) -> Any:
            # Of rows that do not divide, every device computes all.
            rows = whole if arrays[0].shape[0] % devices else PartitionSpec(axis)
            specs = (*[rows] * (len(arrays) - same), *[whole] * same)
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*arrays)

        return call

    return over_rows
