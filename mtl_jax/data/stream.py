"""Endless training batches: every source shuffled and packed by itself, rows by a schedule, one part for each host.

What a batch holds follows from the experiment and its step alone, not from timing nor from the number of worker processes.
Planning, which says which examples share a row, needs their lengths only and takes about a microsecond an example; so every
worker plans all batches and fills its own.

Shapes in names: H hosts, N sources, R rows, T tokens a row, S examples a row.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain import experimental as grain_experimental

from mtl_jax.data import mixture
from mtl_jax.data.batches import Batch, Batching, Part, fill, part_of
from mtl_jax.data.examples import Corpus
from mtl_jax.data.labels import Labels
from mtl_jax.data.mixture import InTurn
from mtl_jax.data.packing import best_fit
from mtl_jax.errors import UserError

AHEAD = 4  # batches made ahead of the step
# Packed together are the examples of so many rows: whole passes of a small source, parts of a pass of a large one.
FEWEST_ROWS, MOST_ROWS = 16, 1024


class Stretch(NamedTuple):
    """Steps with a mixture of their own.

    Attributes:
        steps: How many.
        mixture: As in Batching; so are mixture_end, which is reached at the end of these steps, and shares.
    """

    steps: int
    mixture: str
    mixture_end: str
    shares: dict[str, float]


def schedule(corpus: Corpus, batching: Batching, stretches: Sequence[Stretch]) -> InTurn:
    """Which sources the rows of a run's batches belong to.

    Raises:
        UserError: A mixture or a share is refused.
    """
    sizes = {part.source: int(part.lengths.sum()) for part in _parts(corpus)}
    return InTurn(tuple(mixture.schedule(s.mixture, s.mixture_end, s.shares, sizes, batching.rows, s.steps) for s in stretches))


def one_stretch(batching: Batching, steps: int) -> tuple[Stretch, ...]:
    """The batches' own mixture over the whole run."""
    return (Stretch(steps, batching.mixture, batching.mixture_end, batching.shares),)


def stream(
    corpus: Corpus, batching: Batching, seed: int, stretches: Sequence[Stretch], host: int = 0, hosts: int = 1
) -> Stream:
    """Endless training batches, this host's rows of them.

    Each source is shuffled anew in every pass and repeats by itself, so that a small source does not wait for a large one.
    Host h reads examples h, h + hosts, ... of a source, all of them where there are fewer examples than hosts.

    Args:
        corpus: The data; its train split is used.
        batching: Shape, mixture, worker processes.
        seed: Seed of the order.
        stretches: The steps of the run and their mixtures.
        host: This host, from 0.
        hosts: How many share a global batch.

    Raises:
        UserError: A mixture is refused, or rows cannot be shared among the hosts.
    """
    if batching.rows % hosts:
        raise UserError(f"batch.rows is {batching.rows}; it must be a multiple of the {hosts} hosts")
    if batching.buckets and hosts > 1:
        raise UserError("batch.buckets are for one host: several would cut their rows to different lengths")
    plan = _Plan(
        parts=tuple(_parts(corpus)),
        tasks=tuple(corpus.tasks),
        types=corpus.has_types,
        batching=batching,
        schedule=schedule(corpus, batching, stretches),
        seed=seed,
        host=host,
        hosts=hosts,
    )
    return Stream(plan)


def _parts(corpus: Corpus) -> list[Part]:
    return [part_of(examples, corpus.tasks) for examples in corpus.splits["train"].values()]


class Stream(grain.DatasetIterator[Batch]):  # type: ignore[misc]
    """Batches, made ahead in a thread or in worker processes.

    get_state() is the position after the last batch that was given out, JSON-able; set_state() goes there. It does not depend
    on the number of workers.
    """

    def __init__(self, plan: _Plan):
        super().__init__()
        self._plan = plan
        self._state = plan.start()
        self._ahead: Any = None

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = iter(_ahead(self._plan, self._state))
        batch, self._state = next(self._ahead)
        return batch

    def get_state(self) -> dict[str, Any]:
        return copy.deepcopy(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            UserError: It is that of another host, or was saved by another number of them.
        """
        self._plan.check(state)
        self._stop()
        self._state = copy.deepcopy(state)

    def close(self) -> None:
        """Ends the thread, or the processes."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


@dataclasses.dataclass
class _Kept:
    """Of one source: the chunk that was planned last, and the order of the pass that was drawn last."""

    chunk: int = -1
    rows: Sequence[np.ndarray] = ()
    number: int = -1
    order: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class _Plan:
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
        if state["hosts"] != [self.host, self.hosts] or list(state["next"]) != [part.source for part in self.parts]:
            raise UserError(
                f"the data position was saved by host {state['hosts'][0]} of {state['hosts'][1]} for the sources "
                f"{', '.join(state['next'])}; this is host {self.host} of {self.hosts} for "
                f"{', '.join(part.source for part in self.parts)}: go on with as many, or choose another --workdir"
            )

    def advance(self, state: dict[str, Any], kept: Sequence[_Kept]) -> list[tuple[int, np.ndarray]]:
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

    def _chunk(self, part: Part, chunk: int, kept: _Kept) -> list[np.ndarray]:
        """The rows of one chunk, in random order, each the tickets of its examples: example + pass * (examples there).

        The endless sequence of examples, pass after pass, each in a random order of its own, is cut into chunks of equal
        length, which are packed one by one.
        """
        own = np.arange(self.host, len(part), self.hosts) if len(part) >= self.hosts else np.arange(len(part))
        seeds = [self.seed, zlib.crc32(part.source.encode()), self.host, self.hosts]
        in_row = min(self.batching.slots, self.batching.row_length / max(part.lengths[own].mean(), 1.0))
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
        rows = best_fit(part.lengths[ticket % len(part)], self.batching.row_length, self.batching.slots)
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


class _Steps(grain.IterDataset):  # type: ignore[misc]
    """(batch, the position after it), from a position on; every `step`-th of them, as grain slices for its workers."""

    def __init__(self, plan: _Plan, state: Mapping[str, Any]):
        super().__init__()
        self._plan, self._start, self._slice = plan, state, slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by grain in each worker."""
        self._slice = sl

    def __iter__(self) -> grain.DatasetIterator[tuple[Batch, dict[str, Any]]]:
        return _StepsIterator(self._plan, copy.deepcopy(dict(self._start)), self._slice.start, self._slice.step)


class _StepsIterator(grain.DatasetIterator[tuple[Batch, dict[str, Any]]]):  # type: ignore[misc]
    def __init__(self, plan: _Plan, state: dict[str, Any], skip: int, every: int):
        super().__init__()
        self._plan, self._state, self._skip, self._every = plan, state, skip, every
        self._kept = [_Kept() for _ in plan.parts]

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        for _ in range(self._skip):
            self._plan.advance(self._state, self._kept)
        self._skip = self._every - 1
        rows = self._plan.advance(self._state, self._kept)
        return self._plan.fill(rows), copy.deepcopy(self._state)

    def get_state(self) -> dict[str, Any]:
        return {}  # positions travel with the batches

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def _ahead(plan: _Plan, state: dict[str, Any]) -> grain.IterDataset:
    steps = _Steps(plan, state)
    if not plan.batching.workers:
        return grain_experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=AHEAD)
    if not flags.FLAGS.is_parsed():  # grain reads absl's flags before it starts a process; we have none
        flags.FLAGS.mark_as_parsed()
    # Through pipes: a batch is small, and shared memory of a run that is killed would stay.
    piped = grain_experimental.WithOptionsIterDataset(steps, grain_experimental.DatasetOptions(min_shm_size=2**62))
    options = grain.MultiprocessingOptions(num_workers=plan.batching.workers, per_worker_buffer_size=2)
    return piped.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(number: int, count: int) -> None:
    """A worker leaves Ctrl-C to the run, and ends when that ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
