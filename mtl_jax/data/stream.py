"""Endless training batches: every source shuffled and packed by itself, rows by a schedule, one part for each host.

What a batch holds follows from the experiment and its step alone, not from timing nor from the number of worker processes.
Planning is cheap: every worker plans all batches and fills its own.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
from absl import flags
from grain import experimental as grain_experimental

from mtl_jax.core.errors import UserError
from mtl_jax.data import mixture
from mtl_jax.data.batch_plan import Kept, Plan
from mtl_jax.data.batches import Batch, Batching, Part, part_of
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.mixture import InTurn

AHEAD = 4  # batches made ahead of the step


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
    plan = Plan(
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

    def __init__(self, plan: Plan):
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


class _Steps(grain.IterDataset):  # type: ignore[misc]
    """(batch, the position after it), from a position on; every `step`-th of them, as grain slices for its workers."""

    def __init__(self, plan: Plan, state: Mapping[str, Any]):
        super().__init__()
        self._plan, self._start, self._slice = plan, state, slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by grain in each worker."""
        self._slice = sl

    def __iter__(self) -> grain.DatasetIterator[tuple[Batch, dict[str, Any]]]:
        return _StepsIterator(self._plan, copy.deepcopy(dict(self._start)), self._slice.start, self._slice.step)


class _StepsIterator(grain.DatasetIterator[tuple[Batch, dict[str, Any]]]):  # type: ignore[misc]
    def __init__(self, plan: Plan, state: dict[str, Any], skip: int, every: int):
        super().__init__()
        self._plan, self._state, self._skip, self._every = plan, state, skip, every
        self._kept = [Kept() for _ in plan.parts]

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        for _ in range(self._skip):
            self._plan.advance(self._state, self._kept)
        self._skip = self._every - 1
        rows = self._plan.advance(self._state, self._kept)
        return self._plan.fill(rows), copy.deepcopy(self._state)

    def get_state(self) -> dict[str, Any]:
        return {}  # positions travel with the batches

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a stream is moved as a whole, by Stream.set_state")


def _ahead(plan: Plan, state: dict[str, Any]) -> grain.IterDataset:
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
