"""How many runs go into one program: what programs weigh, and what a device holds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.errors import UserError

MEMINFO = Path("/proc/meminfo")


def weight_of(compiled: Any) -> int:
    """Bytes that a compiled program needs on a device: arguments, results and what lies in between."""
    stats = compiled.memory_analysis()
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(kept + stats.temp_size_in_bytes)


def fit(bytes_of: Callable[[int], int], count: int, together: int, limit: int) -> int:
    """How many runs go into one program, by what programs weigh.

    Args:
        bytes_of: Runs in a program to its bytes on a device; asked seldom, since it compiles.
        count: Runs there are.
        together: They come in multiples of this, the devices that have runs of their own.
        limit: Bytes of a device.

    Raises:
        UserError: Not even the smallest number fits.
    """
    whole = math.ceil(count / together) * together
    most = bytes_of(whole)
    if most <= limit:
        return whole
    least = bytes_of(together) if whole > together else most
    if least > limit:
        raise UserError(
            f"a run needs {least / 1e9:.2f} GB on each device, and there are {limit / 1e9:.2f}: fewer rows in a batch "
            "(batch.rows, batch.accumulate), or --memory, if there is more"
        )
    per_run = max((most - least) / (whole - together), 1.0)
    size = min(whole - together, int((limit - least) / per_run) // together * together + together)
    while size > together and bytes_of(size) > limit:
        size -= together
    return size


def chunks(groups: Sequence[Sequence[Any]], size: int, together: int) -> tuple[list[list[Any]], int]:
    """Runs in chunks of at most `size`, as even as can be, and the one size that fits all of them.

    Args:
        groups: Runs that may be in one chunk.
        size: At most so many, a multiple of `together`.
        together: The size is a multiple of this.
    """
    parts = []
    for group in groups:
        for places in np.array_split(np.arange(len(group)), math.ceil(len(group) / size)):
            parts.append([group[place] for place in places])
    return parts, math.ceil(max(len(part) for part in parts) / together) * together


def memory() -> int:
    """Bytes that a device has for us: what it says, or nine tenths of what the machine has free."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    free = 0
    if MEMINFO.exists():
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    # Elsewhere than on Linux nobody says what is free: half of what there is.
    free = free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free * 9 // 10 // jax.device_count()
