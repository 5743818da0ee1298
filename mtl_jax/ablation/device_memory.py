"""How many runs of a program are trained at once: as many as fit into the memory of the devices, in chunks of one size."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.core.errors import UserError

MEMINFO = Path("/proc/meminfo")


def runs_that_fit(measure: Callable[[int], int], count: int, multiple: int, limit: int) -> int:
    """The number of runs in one program, from the memory that programs need.

    Args:
        measure: Number of runs in a program to its bytes on a device; called a few times only, since it compiles.
        count: Number of runs.
        multiple: The result is a multiple of this number of devices among which runs are divided.
        limit: Bytes of a device.

    Raises:
        UserError: Not even the smallest number fits.
    """
    whole = math.ceil(count / multiple) * multiple
    most = measure(whole)
    if most <= limit:
        return whole
    least = measure(multiple) if whole > multiple else most
    if least > limit:
        raise UserError(
            f"a run needs {least / 1e9:.2f} GB on each device, and there are {limit / 1e9:.2f}: fewer rows in a batch "
            "(batch.rows, batch.accumulate), or --memory, if there is more"
        )
    per_run = max((most - least) / (whole - multiple), 1.0)
    size = min(whole - multiple, int((limit - least) / per_run) // multiple * multiple + multiple)
    while size > multiple and measure(size) > limit:
        size -= multiple
    return size


def chunks(groups: Sequence[Sequence[Any]], size: int, multiple: int) -> tuple[list[list[Any]], int]:
    """Runs in chunks as even as possible, and the one size for all chunks, which the largest needs.

    Args:
        groups: Groups of runs; runs of different groups are in different chunks.
        size: Most runs in a chunk, a multiple of `multiple`.
        multiple: The returned size is a multiple of this.
    """
    parts = []
    for group in groups:
        for places in np.array_split(np.arange(len(group)), math.ceil(len(group) / size)):
            parts.append([group[place] for place in places])
    return parts, math.ceil(max(len(part) for part in parts) / multiple) * multiple


def available() -> int:
    """Bytes of a device that may be used: the limit that it reports, or nine tenths of the host's free memory."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    free = 0
    if MEMINFO.exists():
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    # Systems other than Linux do not report free memory: half of the total counts as free.
    free = free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free * 9 // 10 // jax.device_count()
