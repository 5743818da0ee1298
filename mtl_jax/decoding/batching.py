"""Batches of sources: the few lengths that they are padded to, and the devices that share their rows.

Each length compiles a program of its own, so sources of all lengths share a few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

STEP = 8  # source tokens; bucket lengths are multiples of it


def buckets(lengths: np.ndarray, most: int, limit: int | None = None) -> list[int]:
    """The lengths, ascending and at most `most` of them, that pad the sources least.

    They are multiples of 8, so that similar data get the same ones. The last is at least as long as the longest source.

    Args:
        lengths: i64[N], tokens of each source.
        most: Most lengths to return.
        limit: The most tokens that the model reads, for the last length.
    """
    rounded = np.maximum(-(-lengths // STEP) * STEP, STEP)
    sizes, counts = np.unique(rounded, return_counts=True)
    shorter = np.concatenate([[0], np.cumsum(counts)])  # sources shorter than sizes[i]
    # cost[j]: padded tokens of all sources up to sizes[j] if sizes[j] is a bucket. Each round allows one more bucket.
    cost = (shorter[1:] * sizes).astype(float)
    choices: list[np.ndarray] = []
    for _ in range(min(most, len(sizes)) - 1):
        with_another = cost[:, None] + np.where(
            np.arange(len(sizes))[:, None] < np.arange(len(sizes)), (shorter[1:] - shorter[1:, None]) * sizes, np.inf
        )
        choices.append(with_another.argmin(axis=0))
        cost = np.minimum(with_another.min(axis=0), cost)
    indices = [len(sizes) - 1]
    for choice in reversed(choices):
        if indices[-1] == 0:
            break
        indices.append(int(choice[indices[-1]]))
    chosen = sorted({int(sizes[index]) for index in indices})
    return [min(size, limit) if limit else size for size in chosen]


class Devices(NamedTuple):
    """The devices that share a batch.

    Attributes:
        number: Number of devices.
        rows: Sharding of arrays whose first axis is over rows; None: arrays are left to jax.
        whole: Sharding of the parameters; None: they stay where they are.
    """

    number: int
    rows: Sharding | None
    whole: Sharding | None

    def place_rows(self, arrays: Any) -> Any:
        """Places a tree of arrays, split by rows; their number must be a multiple of the devices."""
        return arrays if self.rows is None else jax.device_put(arrays, self.rows)

    def replicate(self, tree: Any) -> Any:
        """Copies a tree of arrays to every device that does not have it yet."""
        return tree if self.whole is None else jax.device_put(tree, self.whole)


UNPLACED = Devices(1, None, None)


def share_devices(devices: Sequence[jax.Device], batches: int) -> Devices:
    """The devices that share each batch: no more than there are batches for.

    Args:
        devices: The devices of this process; if empty, arrays stay where they are.
        batches: Number of batches that one device alone would have.
    """
    if not devices:
        return UNPLACED
    count = max(1, min(len(devices), batches))
    if count == 1:
        single = SingleDeviceSharding(devices[0])
        return Devices(1, single, single)
    mesh = jax.make_mesh((count,), ("rows",), axis_types=(AxisType.Auto,), devices=devices[:count])
    return Devices(count, NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec()))
