"""The few lengths that sources of all lengths are padded to, as each one is a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

SHORTEST = 8  # source tokens of the smallest bucket, and what all are multiples of


def buckets(lengths: np.ndarray, most: int, limit: int | None = None) -> list[int]:
    """At most so many lengths, ascending, to which sources are padded with the least padding in all.

    Multiples of 8, so that other data of the same kind can be given the same; the last holds the longest source.

    Args:
        lengths: i64[N], tokens of each source.
        most: How many.
        limit: The model's longest row.
    """
    rounded = np.maximum(-(-lengths // SHORTEST) * SHORTEST, SHORTEST)
    sizes, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # sources shorter than sizes[i]
    # cost[j]: places for all sources up to sizes[j], that one being a bucket; one more bucket in every round.
    cost = (below[1:] * sizes).astype(float)
    choices: list[np.ndarray] = []
    for _ in range(min(most, len(sizes)) - 1):
        with_before = cost[:, None] + np.where(
            np.arange(len(sizes))[:, None] < np.arange(len(sizes)), (below[1:] - below[1:, None]) * sizes, np.inf
        )
        choices.append(with_before.argmin(axis=0))
        cost = np.minimum(with_before.min(axis=0), cost)
    found, at = [len(sizes) - 1], len(sizes) - 1
    for choice in reversed(choices):
        if at == 0:
            break
        at = int(choice[at])
        found.append(at)
    chosen = sorted({int(sizes[at]) for at in found})
    return [min(size, limit) if limit else size for size in chosen]


class Devices(NamedTuple):
    """Where things lie.

    Attributes:
        number: How many devices there are.
        rows: Of arrays whose first axis is over rows; None: where jax puts them.
        whole: Of the parameters; None: where they are.
    """

    number: int
    rows: Sharding | None
    whole: Sharding | None

    def place_rows(self, arrays: Any) -> Any:
        """A tree of arrays, cut by rows, of which there are a multiple of the devices."""
        return arrays if self.rows is None else jax.device_put(arrays, self.rows)

    def place_whole(self, tree: Any) -> Any:
        """A tree of arrays, all of it on every device; nothing is copied that is there already."""
        return tree if self.whole is None else jax.device_put(tree, self.whole)


AS_THEY_ARE = Devices(1, None, None)


def share(devices: Sequence[jax.Device], batches: int) -> Devices:
    """As many of a process's devices as there are batches for.

    Args:
        devices: Of this process; none: things stay where they are.
        batches: How many batches of one device there are.
    """
    if not devices:
        return AS_THEY_ARE
    count = max(1, min(len(devices), batches))
    if count == 1:
        alone = SingleDeviceSharding(devices[0])
        return Devices(1, alone, alone)
    mesh = jax.make_mesh((count,), ("rows",), axis_types=(AxisType.Auto,), devices=devices[:count])
    return Devices(count, NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec()))
