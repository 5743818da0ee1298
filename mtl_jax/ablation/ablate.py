"""Runs an ablation: plans it, trains its programs one after another in chunks of runs, and writes its results and report."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.ablation import ablation_dir as folders
from mtl_jax.ablation import space
from mtl_jax.ablation.chunk import Chunk, Shared
from mtl_jax.ablation.plan import Program, Run, programs, runs
from mtl_jax.ablation.prepare_program import Ready, make_ready
from mtl_jax.ablation.remarks import weights_do_nothing
from mtl_jax.ablation.sharing import PAUSE, Ledger, Sharing
from mtl_jax.ablation.sharing import check as check_share
from mtl_jax.core import locks, log_lines, script_calls
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.progress import Progress
from mtl_jax.experiment import Experiment, select
from mtl_jax.training import mesh as meshes
from mtl_jax.training import results
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.counts import evaluations_and_checkpoints, steps_by_phase
from mtl_jax.training.experiment_json import data_to_json, to_json
from mtl_jax.training.features import Features
from mtl_jax.training.preemption import Stop, stop_on_signals
from mtl_jax.training.setup import prepare

log = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds to wait for a report of the ablation that another process is writing


def ablate(
    experiment: Experiment,
    workdir: str | Path,
    vary: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    seeds: int = 1,
    samples: str = "",
    own_order: bool = False,
    at_once: int = 0,
    memory: float = 0.0,
    command: str = "",
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Trains every combination of the varied fields; resumes if an earlier process was stopped.

    Runs that differ in numbers only share a compiled program. Each run gives the numbers that it gives alone, to float
    tolerance, with one exception: if a task's weight is 0 throughout, a run alone leaves the task's rows out and draws other
    dropout.

    Args:
        experiment: The experiment whose fields are varied.
        workdir: The directory to write: ablation.json, and runs/NUMBER, ordinary workdirs without checkpoints.
        vary: Texts "FIELD=VALUES"; see space.axes.
        methods: Weighting rules, such as "cagrad" or "cagrad:c=0.4".
        seeds: Number of seeds, from experiment.seed on.
        samples: How ranges in vary are sampled: "sobol:N" or "random:N".
        own_order: Whether each seed has its own order of the data; else all runs see the same batches.
        at_once: Most runs in one program; 0: as many as fit into memory.
        memory: GB of a device that may be used; 0: its free memory.
        command: The command line, for the record.
        share: The number of this process, from 0, and how many processes, each started with the same arguments, share the runs;
            they need see nothing of each other but the workdir. Process 0 writes the report.

    Returns:
        The contents of ablation.json.

    Raises:
        UserError: Bad input, found before anything is trained or written. Only whether a later program fits into memory is
            found when that program is compiled.
        Interrupted: SIGTERM or SIGINT came; the state is saved.

    Examples:
        >>> ablation = mtl_jax.ablate(EXPERIMENT, "runs/ablation", ["optimizer.learning-rate=1e-3,1e-2"])
        >>> [run["values"]["optimizer.learning_rate"] for run in ablation["runs"]]
        [0.001, 0.01]
    """
    if script_calls.until_train.get():
        raise script_calls.Read(experiment)
    log_lines.show()
    folder = Path(workdir)
    planned = plan(folders.keep_head_weights_of_runs(folder, experiment), vary, methods, seeds, samples, own_order)
    workdirs.check_writable(folder)
    sharing = check_share(*share)
    with locks.workdir(folder) if sharing.alone else contextlib.nullcontext():
        return _ablate(experiment, folder, planned, vary, samples, at_once, memory, command, sharing)


def _ablate(
    experiment: Experiment,
    folder: Path,
    planned: Sequence[Program],
    vary: Sequence[str],
    samples: str,
    at_once: int,
    memory: float,
    command: str,
    sharing: Sharing,
) -> dict[str, Any]:
    with sharing.recording(folder):
        before = folders.check(folder, planned)
    axes = [
        {"fields": [".".join(path) for path in axis.paths], "values": [list(point) for point in axis.points]}
        for axis in space.axes(select(experiment), vary, samples)
    ]
    record = before or {"name": experiment.name, "command": command, "axes": axes}
    record["programs"] = record.get("programs", [describe(program) for program in planned])
    ledger = Ledger(sharing, folder, planned, record)
    if not before:
        _prepare_all(planned)
    total = sum(steps_of(program) * len(program.runs) for program in planned)
    other: collections.Counter[str] = collections.Counter()
    steps: collections.Counter[str] = collections.Counter()
    for program in planned:
        other.update(evaluations_and_checkpoints(program.template, runs=len(program.runs)))
        steps.update(steps_by_phase(program.template, runs=len(program.runs)))
    with stop_on_signals(raise_at_end=True) as stop:
        progress = Progress("ablation", total, coming=other, stretches=steps)
        work = _Work(ledger, stop, progress, at_once, memory, set(), set())
        waiting = sharing.in_order(planned)
        while waiting := [program for program in waiting if not _train_program(work, program)]:
            work.note("other processes train the remaining runs; waiting for them")
            stop.flag.wait(PAUSE)
            stop.check()
        progress.close()
    if sharing.process:
        return folders.read(folder)
    with ledger.opened():
        written = ledger.write()
    from mtl_jax import reporting  # imported late: matplotlib takes a while

    page = reporting.write(folder, folder, patience=PATIENCE)
    for line in (reporting.best_setting(folder), f"the report is {page}"):
        log.info("%s", line)
    return written


class _Work(NamedTuple):
    """What the programs of an ablation are trained with.

    Attributes:
        ledger: The record.
        stop: Whether the process was asked to stop.
        progress: The bar over all runs.
        at_once: Most runs in one program; 0: as many as fit.
        memory: GB of a device that may be used; 0: its free memory.
        notes: Lines that were logged: programs have most of them in common.
        skipped: Runs that the bar counts as done without training here.
    """

    ledger: Ledger
    stop: Stop
    progress: Progress
    at_once: int
    memory: float
    notes: set[str]
    skipped: set[str]

    def skip(self, program: Program, runs: Sequence[Run]) -> None:
        """Counts runs that were trained before, or elsewhere."""
        remaining = {run.name for run in runs} - self.skipped
        self.skipped.update(remaining)
        span = (program.template, 0, None, len(remaining))
        self.progress.skip(steps_by_phase(*span), evaluations_and_checkpoints(*span))

    def note(self, line: str) -> None:
        """Logs a line once."""
        if line not in self.notes:
            log.info("%s", line)
        self.notes.add(line)


def _train_program(work: _Work, program: Program) -> bool:
    """Trains the chunks of a program that no other process has or has trained; whether all its runs are done."""
    ledger, sharing = work.ledger, work.ledger.sharing
    with ledger.opened():
        pass
    if ledger.ended(program.runs):
        work.skip(program, program.runs)
        return True
    if not ledger.has_work(program):
        return False
    entry, planned = ledger.entry(program), ledger.planned
    settings = ", ".join(f"{name} {value}" for name, value in describe(program)["fixed"].items())
    title = f"program {program.number + 1} of {len(planned)}{f' ({settings})' if settings else ''}"
    log.info("%s: %s, compiling ...", title, count(len(program.runs), "run"))
    most = sharing.at_once(planned, program, work.at_once)
    ready = make_ready(program, most, work.memory, entry.get("size", 0))
    while not ledger.agrees(program, ready.machine.size):
        ready = make_ready(program, most, work.memory, entry["size"])
    remark = weights_do_nothing(program, ready.prepared.plans)
    if remark:
        log.info("program %d: %s", program.number, remark)
    with ledger.opened():
        entry["chunks"] = len(ready.chunks)
        entry["bytes"] = ready.machine.weight or entry.get("bytes", 0)
        if remark:
            entry["remark"] = remark
        ledger.write()
        workdirs.create(folders.of_program(ledger.folder, program.number))
        trunks.save(ready.prepared.trunk, folders.of_program(ledger.folder, program.number) / "trunk")
    for line in ready.prepared.notes:
        work.note(line)
    _train(ready, work)
    return ledger.ended(program.runs)


def plan(
    experiment: Experiment,
    vary: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int = 1,
    samples: str = "",
    own_order: bool = False,
) -> list[Program]:
    """The programs of an ablation; arguments as for ablate.

    Raises:
        UserError: The experiment or an argument is refused.
    """
    if jax.process_count() > 1:
        raise UserError(
            "an ablation trains on the devices of one process: leave out jax.distributed.initialize, and give share"
        )
    experiment = select(experiment)
    return programs(runs(experiment, space.axes(experiment, vary, samples), methods, seeds, own_order=own_order))


def _prepare_all(planned: Sequence[Program]) -> None:
    """Prepares every program once, so that bad data, tasks or trunks of later programs are found before the first one trains.

    Raises:
        UserError: A program cannot be prepared.
    """
    prepared = set()
    for program in planned[1:]:  # the first program is prepared next
        comparable = dataclasses.replace(program.template, seed=0, weighting="equal", weighting_options={}, weights={})
        text = json.dumps(to_json(comparable), sort_keys=True)
        if text not in prepared:
            prepared.add(text)
            prepare(dataclasses.replace(program.template, devices=1))


def share(ready: Ready, folder: Path, stop: Stop, progress: Progress) -> Shared:
    """The objects that all chunks of a program use."""
    prepared = ready.prepared

    @functools.cache
    def table() -> jax.Array:
        params = meshes.place(next(iter(ready.params.values())), meshes.replicated(prepared.mesh))
        return Features(prepared, stop).table(params, "features")

    def run_folder(run: Run) -> Path:
        return folders.of_run(folder, run.name)

    return Shared(ready.machine, ready.params, table, run_folder, stop, progress)


def _train(ready: Ready, work: _Work) -> None:
    """Trains the chunks of a program that are not done and that no other process has."""
    ledger, prepared, number = work.ledger, ready.prepared, ready.program.number
    shared = share(ready, ledger.folder, work.stop, work.progress)
    kind = prepared.experiment.evaluation.baseline
    features = np.asarray(shared.table()) if kind == "probe" else None
    baselines = results.compute_baselines(prepared.corpus, prepared.experiment.sources, kind, features)
    data = data_to_json(prepared.corpus.describe(), prepared.experiment, prepared.corpus.tasks, prepared.copies)
    recorded = 0.0  # seconds of compiling that are in the record
    for place, chunk in ledger.sharing.in_order(list(enumerate(ready.chunks))):
        with ledger.sharing.taking(ledger.folder, number, place) as taken:
            with ledger.opened():
                pass
            if ledger.ended(chunk):
                work.skip(ready.program, chunk)
                continue
            if not taken:
                continue
            for run in chunk:
                files = {"versions": workdirs.versions(), "data": data, "baselines": baselines}
                records = {f"{name}.json": value for name, value in files.items()} | ready.loaded[run.experiment.seed]
                for name, value in records.items():
                    workdirs.write_json(shared.run_folder(run) / name, value)
            training = Chunk(shared, chunk, ready.values(chunk), folders.of_chunk(ledger.folder, number, place))
            fates = zip(chunk, training.train(), strict=True)
            ended = {run.name: f"diverged {fate.diverged}" if fate.diverged else "done" for run, fate in fates}
            work.skipped.update(ended)
            compiling = ready.machine.compile_seconds - recorded
            recorded += compiling
            ledger.end(ready.program, place, ended, training.counts.seconds, compiling)


def steps_of(program: Program) -> int:
    """Number of steps of each run."""
    return sum(phase.steps for phase in program.template.phases)


def describe(program: Program) -> dict[str, Any]:
    """The entry of a program in ablation.json before it begins."""
    first = program.runs[0].values
    fixed = {name: value for name, value in first.items() if all(run.values.get(name) == value for run in program.runs)}
    return {"program": program.number, "fixed": fixed, "runs": len(program.runs), "steps": steps_of(program)}
