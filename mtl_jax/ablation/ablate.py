"""An ablation from its words to its results: programs one after another, each in chunks of runs that are trained at once."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.ablation import ablation_dir as folders
from mtl_jax.ablation import space
from mtl_jax.ablation.chunk import Chunk, Shared
from mtl_jax.ablation.plan import Program, Run, programs, runs
from mtl_jax.ablation.prepare_program import Ready, make_ready
from mtl_jax.ablation.remarks import weights_do_nothing
from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.core.progress import Progress
from mtl_jax.experiment import Experiment, select
from mtl_jax.experiment_json import tasks_to_json, to_json
from mtl_jax.training import mesh as meshes
from mtl_jax.training import results
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.counts import other_work, steps_by_phase
from mtl_jax.training.features import Features
from mtl_jax.training.preemption import Stop, asked_to_stop
from mtl_jax.training.setup import prepare

log = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds for which a report that somebody else makes of the ablation is waited for


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
) -> dict[str, Any]:
    """Trains every combination of what is varied; goes on where an earlier process stopped.

    Runs that differ in numbers only share a compiled program. Each of them gives the numbers that it gives alone, to float
    tolerance; only draws of dropout are others where a weight is 0 throughout, since alone such a task's rows are left out.

    Args:
        experiment: What stays.
        workdir: Where everything is written: ablation.json, and runs/NUMBER, ordinary workdirs but for their checkpoints.
        vary: "FIELD=VALUES" each; see space.axes.
        methods: Weighting rules, such as "cagrad" or "cagrad:c=0.4".
        seeds: How many seeds, from experiment.seed on.
        samples: How ranges in vary are drawn: "sobol:N" or "random:N".
        own_order: Whether each seed has its own order of the data; else all runs see the same batches.
        at_once: Most runs in one program; 0: as many as fit into memory.
        memory: GB of a device that may be used; 0: what there is.
        command: What was typed, for the record.

    Returns:
        The contents of ablation.json.

    Raises:
        UserError: Bad input, found before anything is trained or written; but that a later program does not fit into memory,
            which is measured, is found when its turn comes.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    folder = Path(workdir)
    planned = plan(folders.keep_head_weights_of_runs(folder, experiment), vary, methods, seeds, samples, own_order)
    workdirs.check_writable(folder)
    with locks.workdir(folder):
        return _ablate(experiment, folder, planned, vary, samples, at_once, memory, command)


def _ablate(
    experiment: Experiment,
    folder: Path,
    planned: Sequence[Program],
    vary: Sequence[str],
    samples: str,
    at_once: int,
    memory: float,
    command: str,
) -> dict[str, Any]:
    before = folders.check(folder, planned)
    axes = [
        {"fields": [".".join(path) for path in axis.paths], "values": [list(point) for point in axis.points]}
        for axis in space.axes(select(experiment), vary, samples)
    ]
    record = before or {"name": experiment.name, "command": command, "axes": axes}
    record["programs"] = record.get("programs", [about(program) for program in planned])
    status = {run["run"]: run["status"] for run in record.get("runs", ()) if run["status"] != folders.WAITING}
    if not before:
        _read_all(planned)
    total = sum(steps_of(program) * len(program.runs) for program in planned)
    coming: collections.Counter[str] = collections.Counter()
    stretches: collections.Counter[str] = collections.Counter()
    for program in planned:
        coming.update(other_work(program.template, runs=len(program.runs)))
        stretches.update(steps_by_phase(program.template, runs=len(program.runs)))
    with asked_to_stop() as stop:
        progress = Progress("ablation", total, coming=coming, stretches=stretches)
        for program in planned:
            known = record["programs"][program.number]
            if all(run.name in status for run in program.runs):
                span = (program.template, 0, None, len(program.runs))
                progress.skip(steps_by_phase(*span), other_work(*span))
                continue
            ready = make_ready(program, at_once, memory, known.get("size", 0))
            known |= {"size": ready.machine.size, "chunks": len(ready.chunks)}
            known["bytes"] = ready.machine.weight or known.get("bytes", 0)
            remark = weights_do_nothing(program, ready.prepared.plans)
            if remark:
                log.info("program %d: %s", program.number, remark)
                known["remark"] = remark
            folders.begin(folder, planned)
            folders.write(folder, record, planned, status)

            earlier = known.get("compile_seconds", 0.0)  # what went on from a checkpoint compiles again

            def tell(
                ended: dict[str, str],
                seconds: float,
                ready: Ready = ready,
                known: dict[str, Any] = known,
                earlier: float = earlier,
            ) -> None:
                status.update(ended)
                known["seconds"] = round(known.get("seconds", 0.0) + seconds, 1)
                known["compile_seconds"] = round(earlier + ready.machine.compile_seconds, 1)
                folders.write(folder, record, planned, status)

            _train(ready, folder, stop, progress, status, tell)
        progress.close()
    found = folders.write(folder, record, planned, status)
    from mtl_jax import report  # imported late: matplotlib takes a while

    report.write(folder, folder, patience=PATIENCE)
    return found


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
        UserError: Something of it is refused.
    """
    if jax.process_count() > 1:
        raise UserError("an ablation trains on the devices of one process; start it without --distributed")
    experiment = select(experiment)
    return programs(runs(experiment, space.axes(experiment, vary, samples), methods, seeds, own_order=own_order))


def _read_all(planned: Sequence[Program]) -> None:
    """Prepares every program once, in turn, so that no data, task or trunk of a later one turns out to be wrong in the end.

    Raises:
        UserError: One of them cannot be prepared.
    """
    known = set()
    for program in planned[1:]:  # the first one is prepared next
        alike = dataclasses.replace(program.template, seed=0, weighting="equal", weighting_options={}, weights={})
        text = json.dumps(to_json(alike), sort_keys=True)
        if text not in known:
            known.add(text)
            prepare(dataclasses.replace(program.template, devices=1))


def share(ready: Ready, folder: Path, stop: Stop, progress: Progress) -> Shared:
    """What the chunks of a program share."""
    prepared = ready.prepared
    tables: list[jax.Array] = []

    def table() -> jax.Array:
        if not tables:
            some = meshes.place(next(iter(ready.params.values())), meshes.replicated(prepared.mesh))
            tables.append(Features(prepared, stop).table(some, "features"))
        return tables[0]

    def run_folder(run: Run) -> Path:
        return folders.of_run(folder, run.name)

    return Shared(ready.machine, ready.params, table, run_folder, stop, progress)


def _train(
    ready: Ready,
    folder: Path,
    stop: Stop,
    progress: Progress,
    status: dict[str, str],
    tell: Callable[[dict[str, str], float], None],
) -> None:
    """Trains the chunks that are not done."""
    prepared, number = ready.prepared, ready.program.number
    for note in prepared.notes:
        log.info("%s", note)
    workdirs.create(folders.of_program(folder, number))
    trunks.save(prepared.trunk, folders.of_program(folder, number) / "trunk")
    shared = share(ready, folder, stop, progress)
    kind = prepared.experiment.evaluation.baseline
    features = np.asarray(shared.table()) if kind == "probe" else None
    compared = results.baselines(prepared.corpus, prepared.experiment.sources, kind, features)
    data = prepared.corpus.describe() | {"tasks": tasks_to_json(prepared.corpus.tasks)}
    for place, chunk in enumerate(ready.chunks):
        if all(run.name in status for run in chunk):
            span = (prepared.experiment, 0, None, len(chunk))
            progress.skip(steps_by_phase(*span), other_work(*span))
            continue
        for run in chunk:
            files = {"versions": workdirs.versions(), "data": data, "baselines": compared}
            if run.experiment.seed in ready.begun:
                files["init_from"] = ready.begun[run.experiment.seed]
            for name, value in files.items():
                workdirs.write_json(shared.run_folder(run) / f"{name}.json", value)
        training = Chunk(shared, chunk, ready.values(chunk), folders.of_chunk(folder, number, place))
        fates = zip(chunk, training.train(), strict=True)
        ended = {run.name: f"diverged {fate.diverged}" if fate.diverged else "done" for run, fate in fates}
        tell(ended, training.counts.seconds)


def steps_of(program: Program) -> int:
    """Steps of a run."""
    return sum(phase.steps for phase in program.template.phases)


def about(program: Program) -> dict[str, Any]:
    """What ablation.json says of a program before it begins."""
    first = program.runs[0].values
    same = {name: value for name, value in first.items() if all(run.values.get(name) == value for run in program.runs)}
    return {"program": program.number, "fixed": same, "runs": len(program.runs), "steps": steps_of(program)}
