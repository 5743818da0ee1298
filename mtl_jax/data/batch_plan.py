"""The plan of training batches: which examples are in which row of which step, on which host.

It follows from the experiment alone, needs only the lengths of examples, and takes about a microsecond an example.

Shapes in names: H hosts, N sources.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, fill
from mtl_jax.data.labels import Labels
from mtl_jax.data.mixture_schedule import ScheduleSequence
from mtl_jax.data.packing import best_fit
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.data.source_arrays import SourceArrays

# The examples of so many rows are packed together: whole passes of a small source, parts of a pass of a large one.
FEWEST_ROWS, MOST_ROWS = 16, 1024


@dataclasses.dataclass
class PlanCache:
    """The last planned chunk of a source, and the order of the last pass."""

    chunk: int = -1
    rows: Sequence[np.ndarray] = ()
    number: int = -1
    order: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run's training batches on one host; `fill` explains its tickets. A position in it is

    {"step": steps done, "hosts": [host, hosts], "next": {source: [chunk, rows of it that are used]},
     "dealt": for each host and source the rows that the host has had}

    Attributes:
        sources: The sources, in the run's order.
        tasks: The tasks whose labels are in the batches.
        types: Whether the batches have token types.
        batching: Shape of the batches.
        schedule: How many rows each source has in each step.
        seed: Seed of the order.
        host: This host, from 0.
        hosts: Number of hosts.
    """

    sources: tuple[SourceArrays, ...]
    tasks: tuple[Labels, ...]
    types: bool
    batching: Batching
    schedule: ScheduleSequence | PoissonSchedule
    seed: int
    host: int
    hosts: int

    def start(self) -> dict[str, Any]:
        """The position of the first step."""
        names = [source.source for source in self.sources]
        dealt = [[0] * len(names) for _ in range(self.hosts)]
        return {"step": 0, "hosts": [self.host, self.hosts], "next": {name: [0, 0] for name in names}, "dealt": dealt}

    def check(self, state: dict[str, Any]) -> None:
        """Raises UserError where a position belongs to another host, another number of hosts or other sources."""
        if state["hosts"] != [self.host, self.hosts] or state["next"].keys() != {source.source for source in self.sources}:
            raise UserError(
                f"the data position was saved by host {state['hosts'][0]} of {state['hosts'][1]} for the sources "
                f"{listed(state['next'])}; this is host {self.host} of {self.hosts} for "
                f"{listed(source.source for source in self.sources)}: resume with the same, or choose another --workdir"
            )

    def advance(self, state: dict[str, Any], caches: Sequence[PlanCache]) -> list[tuple[int, np.ndarray]]:
        """The rows of this host in the next step, in the form that `fill` takes; moves `state` past them.

        Args:
            state: A position.
            caches: One for each source, kept between calls.
        """
        assert isinstance(self.schedule, ScheduleSequence)
        counts = self.schedule.counts(state["step"])
        dealt_HxN = rows_per_host(np.array(list(counts.values())), np.array(state["dealt"]), self.batching.rows // self.hosts)
        state["dealt"] = (np.array(state["dealt"]) + dealt_HxN).tolist()
        state["step"] += 1
        rows: list[tuple[int, np.ndarray]] = []
        for number, source in enumerate(self.sources):
            chunk, used = state["next"][source.source]
            left = int(dealt_HxN[self.host, number])
            while left:
                cache = caches[number]
                if cache.chunk != chunk:
                    cache.chunk, cache.rows = chunk, self._chunk(source, chunk, cache)
                taken = cache.rows[used : used + left]
                rows += [(number, tickets) for tickets in taken]
                left -= len(taken)
                used += len(taken)
                chunk, used = (chunk, used) if used < len(cache.rows) else (chunk + 1, 0)
            state["next"][source.source] = [chunk, used]
        return rows

    def _chunk(self, source: SourceArrays, chunk: int, cache: PlanCache) -> list[np.ndarray]:
        """The rows of one chunk, in random order, as tickets.

        The endless sequence of examples, pass after pass, each pass in its own random order, is divided into chunks of equal
        length, which are packed one by one.
        """
        total = len(source)
        local = np.arange(self.host, total, self.hosts) if total >= self.hosts else np.arange(total)
        seeds = [self.seed, zlib.crc32(source.source.encode()), self.host, self.hosts]
        lengths = source.packing_lengths(self.batching)
        in_row = min(source.slots(self.batching), self.batching.row_length / max(lengths[local].mean(), 1.0))
        if len(local) <= MOST_ROWS * in_row:
            size = len(local) * math.ceil(FEWEST_ROWS * in_row / len(local))
        else:
            size = int(MOST_ROWS * in_row)
        tickets, start, end = [], chunk * size, (chunk + 1) * size
        while start < end:
            number, first = divmod(start, len(local))
            if cache.number != number:
                order = np.random.default_rng([*seeds, number]).permutation(len(local))
                cache.number, cache.order = number, order.astype(np.int32)
            order = cache.order[first : first + end - start]
            tickets.append(local[order] + number * total)
            start += len(order)
        ticket = np.concatenate(tickets)
        rows = best_fit(lengths[ticket % total], self.batching.row_length, source.slots(self.batching))
        shuffled = np.random.default_rng([*seeds, chunk, 1]).permutation(len(rows))
        return [ticket[rows[n]] for n in shuffled]

    def fill(self, rows: Sequence[tuple[int, np.ndarray]]) -> Batch:
        """The batch of the rows from advance()."""

        def generator(source: SourceArrays, ticket: int) -> np.random.Generator:
            return np.random.default_rng([self.seed, zlib.crc32(source.source.encode()), ticket])

        total = self.batching.rows // self.hosts
        return fill(self.sources, rows, self.tasks, self.batching, total, self.types, generator, self.seed)


@dataclasses.dataclass(frozen=True)
class PoissonPlan(Plan):
    """The plan of batches whose examples are drawn independently, each in a row of its own; on one host."""

    def advance(self, state: dict[str, Any], caches: Sequence[PlanCache]) -> list[tuple[int, np.ndarray]]:
        """The rows of the next step, in the form that `fill` takes; moves `state` past them."""
        assert isinstance(self.schedule, PoissonSchedule)
        step, rates = state["step"], self.schedule.rates(state["step"])
        state["step"] += 1
        rows: list[tuple[int, np.ndarray]] = []
        for number, source in enumerate(self.sources):
            rng = np.random.default_rng([self.seed, zlib.crc32(source.source.encode()), step, 2])
            # So many, and which, is the same as a decision for each example, in less time.
            drawn = rng.choice(len(source), rng.binomial(len(source), rates[source.source]), replace=False)
            rows += [(number, np.array([step * len(source) + example])) for example in drawn.tolist()]
        kept = np.random.default_rng([self.seed, step, 3]).permutation(len(rows))[: self.batching.rows]
        return [rows[n] for n in kept.tolist()]


def rows_per_host(counts_N: np.ndarray, dealt_HxN: np.ndarray, host_rows: int) -> np.ndarray:
    """i64[H, N]: how many of a step's rows of each source each host gets.

    First every host gets the same number of rows of every source. The remaining rows of a source go to the hosts that have had
    the fewest of it, and sources with the largest difference between hosts come first. So every host sees a rare source, too.

    Args:
        counts_N: Rows of each source in the step.
        dealt_HxN: Rows that each host has had before.
        host_rows: Rows of a host in the step.
    """
    hosts = len(dealt_HxN)
    given_HxN = np.repeat(counts_N[None] // hosts, hosts, axis=0)
    room_H = host_rows - given_HxN.sum(axis=1)
    left_N = counts_N % hosts
    uneven_N = dealt_HxN.max(axis=0) - dealt_HxN.min(axis=0)
    for number in sorted(np.flatnonzero(left_N).tolist(), key=lambda n: (-uneven_N[n], n)):
        for _ in range(left_N[number]):
            open_H = np.flatnonzero(room_H > 0)
            had_H = dealt_HxN[open_H, number] + given_HxN[open_H, number]
            host = open_H[np.lexsort((-room_H[open_H], had_H))[0]]
            given_HxN[host, number] += 1
            room_H[host] -= 1
    return given_HxN
