"""Which examples stand in which row of which step, and on which host: follows from the experiment alone.

Planning needs the examples' lengths only and takes about a microsecond an example.

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
from mtl_jax.data.batches import Batch, Batching, Part, fill
from mtl_jax.data.labels import Labels
from mtl_jax.data.mixture import InTurn
from mtl_jax.data.packing import best_fit

# Packed together are the examples of so many rows: whole passes of a small source, parts of a pass of a large one.
FEWEST_ROWS, MOST_ROWS = 16, 1024


@dataclasses.dataclass
class Kept:
    """Of one source: the chunk that was planned last, and the order of the pass that was drawn last."""

    chunk: int = -1
    rows: Sequence[np.ndarray] = ()
    number: int = -1
    order: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples are in which row of which step. A position in it is

    {"step": steps done, "hosts": [host, hosts], "next": {source: [chunk, rows of it that are out]},
     "dealt": for each host and source the rows it got}
    """

    parts: tuple[Part, ...]
    tasks: tuple[Labels, ...]
    types: bool
    batching: Batching
    schedule: InTurn
    seed: int
    host: int
    hosts: int

    def start(self) -> dict[str, Any]:
        names = [part.source for part in self.parts]
        dealt = [[0] * len(names) for _ in range(self.hosts)]
        return {"step": 0, "hosts": [self.host, self.hosts], "next": {name: [0, 0] for name in names}, "dealt": dealt}

    def check(self, state: dict[str, Any]) -> None:
        if state["hosts"] != [self.host, self.hosts] or state["next"].keys() != {part.source for part in self.parts}:
            raise UserError(
                f"the data position was saved by host {state['hosts'][0]} of {state['hosts'][1]} for the sources "
                f"{listed(state['next'])}; this is host {self.host} of {self.hosts} for "
                f"{listed(part.source for part in self.parts)}: go on with as many, or choose another --workdir"
            )

    def advance(self, state: dict[str, Any], kept: Sequence[Kept]) -> list[tuple[int, np.ndarray]]:
        """The rows of this host in the next step, as `fill` takes them, source by source; moves `state` past them.

        Args:
            state: A position.
            kept: For each source what is kept between calls.
        """
        counts = self.schedule.counts(state["step"])
        dealt_HxN = deal(np.array(list(counts.values())), np.array(state["dealt"]), self.batching.rows // self.hosts)
        state["dealt"] = (np.array(state["dealt"]) + dealt_HxN).tolist()
        state["step"] += 1
        rows: list[tuple[int, np.ndarray]] = []
        for number, part in enumerate(self.parts):
            chunk, out = state["next"][part.source]
            left = int(dealt_HxN[self.host, number])
            while left:
                if kept[number].chunk != chunk:
                    kept[number].chunk, kept[number].rows = chunk, self._chunk(part, chunk, kept[number])
                there = kept[number].rows
                taken = there[out : out + left]
                rows += [(number, tickets) for tickets in taken]
                left -= len(taken)
                chunk, out = (chunk, out + len(taken)) if out + len(taken) < len(there) else (chunk + 1, 0)
            state["next"][part.source] = [chunk, out]
        return rows

    def _chunk(self, part: Part, chunk: int, kept: Kept) -> list[np.ndarray]:
        """The rows of one chunk, in random order, each the tickets of its examples: example + pass * (examples there).

        The endless sequence of examples, pass after pass, each in a random order of its own, is cut into chunks of equal
        length, which are packed one by one.
        """
        own = np.arange(self.host, len(part), self.hosts) if len(part) >= self.hosts else np.arange(len(part))
        seeds = [self.seed, zlib.crc32(part.source.encode()), self.host, self.hosts]
        room = part.room(self.batching)
        in_row = min(self.batching.slots, self.batching.row_length / max(room[own].mean(), 1.0))
        if len(own) <= MOST_ROWS * in_row:
            size = len(own) * math.ceil(FEWEST_ROWS * in_row / len(own))
        else:
            size = int(MOST_ROWS * in_row)
        tickets, at, end = [], chunk * size, (chunk + 1) * size
        while at < end:
            number, first = divmod(at, len(own))
            if kept.number != number:
                order = np.random.default_rng([*seeds, number]).permutation(len(own))
                kept.number, kept.order = number, order.astype(np.int32)
            order = kept.order[first : first + end - at]
            tickets.append(own[order] + number * len(part))
            at += len(order)
        ticket = np.concatenate(tickets)
        rows = best_fit(room[ticket % len(part)], self.batching.row_length, self.batching.slots)
        shuffled = np.random.default_rng([*seeds, chunk, 1]).permutation(len(rows))
        return [ticket[rows[n]] for n in shuffled]

    def fill(self, rows: Sequence[tuple[int, np.ndarray]]) -> Batch:
        """The batch of the rows that advance() gave."""

        def draw(part: Part, ticket: int) -> np.random.Generator:
            return np.random.default_rng([self.seed, zlib.crc32(part.source.encode()), ticket])

        return fill(self.parts, rows, self.tasks, self.batching, self.batching.rows // self.hosts, self.types, draw)


def deal(counts_N: np.ndarray, dealt_HxN: np.ndarray, each: int) -> np.ndarray:
    """i64[H, N]: how many of a step's rows of each source go to each host; `each` to every host in all.

    Every host gets its equal part of every source as far as that is whole. Of what is left of a source the hosts that had the
    least of it before get a row more, the source with the largest difference between hosts first, so that also a source that is
    seldom seen goes round.

    Args:
        counts_N: Rows of each source in the step.
        dealt_HxN: Rows that each host got before.
        each: Rows of a host.
    """
    hosts = len(dealt_HxN)
    given_HxN = np.repeat(counts_N[None] // hosts, hosts, axis=0)
    room_H = each - given_HxN.sum(axis=1)
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
