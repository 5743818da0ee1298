"""A batch on several devices: each has a part of its rows, and all of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


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
