"""Endless training batches: each source is shuffled and packed alone, a schedule chooses its rows, each host has its part.

A batch depends on the experiment and the step alone, not on timing or the number of worker processes. Planning is cheap: every
worker plans all batches and fills its own.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import grain
from absl import flags
from grain import experimental as grain_experimental

from mtl_jax.core.errors import UserError
from mtl_jax.data import mixture, mixture_schedule, poisson
from mtl_jax.data.batch_plan import Plan, PlanCache, PoissonPlan
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.mixture_schedule import ScheduleSequence
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.data.source_arrays import SourceArrays, source_arrays

AHEAD = 4  # batches made ahead of the step


class MixturePhase(NamedTuple):
    """The mixture of a phase.

    Attributes:
        steps: Steps of the phase.
        mixture: The mixture at its first step.
        mixture_end: The mixture at its last step; empty: the same.
        shares: For the mixture fixed: a number for each source.
    """

    steps: int
    mixture: str
    mixture_end: str
    shares: dict[str, float]


def schedule(corpus: Corpus, batching: Batching, phases: Sequence[MixturePhase]) -> ScheduleSequence | PoissonSchedule:
    """The schedule that gives each row of a run its source.

    Raises:
        UserError: A mixture or a share is refused.
    """
    arrays = _train_arrays(corpus)
    sizes = {source.source: int(source.lengths.sum()) for source in arrays}
    if batching.sampling == "poisson":
        by_phase = [(phase.steps, mixture.shares(phase.mixture, sizes, phase.shares)) for phase in phases]
        return poisson.schedule(batching, {source.source: len(source) for source in arrays}, by_phase)
    return ScheduleSequence(
        tuple(mixture_schedule.schedule(p.mixture, p.mixture_end, p.shares, sizes, batching.rows, p.steps) for p in phases)
    )


def single_phase(batching: Batching, steps: int) -> tuple[MixturePhase, ...]:
    """The mixture of a Batching over the whole run, as its only phase."""
    return (MixturePhase(steps, batching.mixture, batching.mixture_end, batching.shares),)


def stream(
    corpus: Corpus, batching: Batching, seed: int, phases: Sequence[MixturePhase], host: int = 0, hosts: int = 1
) -> Stream:
    """Endless training batches; of each batch the rows of this host.

    Each source is shuffled anew in every pass and starts again independently of the others, so that a small source does not
    wait for a large one. Host h reads examples h, h + hosts, ... of a source, or all of them if there are fewer examples than
    hosts.

    Args:
        corpus: The data; its train split is used.
        batching: Shape, mixture, worker processes.
        seed: Seed of the order.
        phases: The mixtures of the run's phases.
        host: This host, from 0.
        hosts: Number of hosts that share a global batch.

    Raises:
        UserError: A mixture is refused, or rows cannot be shared among the hosts.
    """
    if batching.rows % hosts:
        raise UserError(f"batch.rows is {batching.rows}; it must be a multiple of the {hosts} hosts")
    if batching.buckets and hosts > 1:
        raise UserError("batch.buckets are for one host: several hosts would choose different row lengths")
    check_hosts(batching, hosts)
    plan = (PoissonPlan if batching.sampling == "poisson" else Plan)(
        sources=tuple(_train_arrays(corpus)),
        tasks=tuple(corpus.tasks),
        types=corpus.has_types,
        batching=batching,
        schedule=schedule(corpus, batching, phases),
        seed=seed,
        host=host,
        hosts=hosts,
    )
    return Stream(plan)


def check_hosts(batching: Batching, hosts: int) -> None:
    """Raises UserError where so many hosts cannot draw the rows of a batch."""
    if batching.sampling == "poisson" and hosts > 1:
        raise UserError(f"batch.sampling poisson is for one process, and this run has {hosts}")


def _train_arrays(corpus: Corpus) -> list[SourceArrays]:
    return [
        dataclasses.replace(source_arrays(examples, corpus.tasks), redraw=corpus.redraws.get(name))
        for name, examples in corpus.splits["train"].items()
    ]


class Stream(grain.DatasetIterator[Batch]):  # type: ignore[misc]
    """Batches, made ahead in a thread or in worker processes.

    get_state() is the position after the last batch returned, JSON-able; set_state() moves the stream to such a position. It
    does not depend on the number of workers.
    """

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = self._whole = plan
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
        """Moves the stream to a position.

        Raises:
            UserError: The position was saved by another host, or with another number of hosts.
        """
        self._plan.check(state)
        self._stop()
        self._state = copy.deepcopy(state)

    def keep(self, chosen: Mapping[str, Any], before: Collection[str] | None = None) -> None:
        """From here on, reads only some examples of some sources, and all of the others.

        Args:
            chosen: {source: i64, the places of the examples that are read}.
            before: At the start of a phase, the sources of which the phase before read some examples only: these and the chosen
                ones start a new pass. None: the position is one among the same examples.
        """
        if not chosen and not before:
            return
        self._stop()
        for name in () if before is None else {*chosen, *before}:
            self._state["next"][name] = [0, 0]
        self._plan = dataclasses.replace(
            self._whole, sources=tuple(source.only(chosen.get(source.source)) for source in self._whole.sources)
        )

    def close(self) -> None:
        """Ends the thread, or the processes."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Steps(grain.IterDataset):  # type: ignore[misc]
    """(batch, the position after it) from a position on; with a slice, which grain sets in each worker, every n-th of them."""

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
        self._caches = [PlanCache() for _ in plan.sources]

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        for _ in range(self._skip):
            self._plan.advance(self._state, self._caches)
        self._skip = self._every - 1
        rows = self._plan.advance(self._state, self._caches)
        return self._plan.fill(rows), copy.deepcopy(self._state)

    def get_state(self) -> dict[str, Any]:
        return {}  # positions travel with the batches

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("only Stream.set_state moves a stream")


def _ahead(plan: Plan, state: dict[str, Any]) -> grain.IterDataset:
    steps = _Steps(plan, state)
    if not plan.batching.workers:
        return grain_experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=AHEAD)
    if not flags.FLAGS.is_parsed():  # grain reads absl's flags before it starts a process; this package has none
        flags.FLAGS.mark_as_parsed()
    # Through pipes: a batch is small, and the shared memory of a killed run would not be freed.
    piped = grain_experimental.WithOptionsIterDataset(steps, grain_experimental.DatasetOptions(min_shm_size=2**62))
    options = grain.MultiprocessingOptions(num_workers=plan.batching.workers, per_worker_buffer_size=2)
    return piped.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(number: int, count: int) -> None:
    """A worker ignores Ctrl-C, which the run handles, and exits when the run's process ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
