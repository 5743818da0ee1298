"""An ablation from its words to its results: programs one after another, each in chunks of runs that are trained at once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.ablation import numbers, sizes, space, together
from mtl_jax.ablation.chunk import Chunk, Shared
from mtl_jax.ablation.machine import Machine
from mtl_jax.ablation.numbers import Numbers
from mtl_jax.ablation.plan import Program, Run, order_of, programs, runs
from mtl_jax.data.stream import stream
from mtl_jax.errors import UserError
from mtl_jax.experiment import Experiment, data_seed_of, tasks_to_json, to_json
from mtl_jax.progress import Progress
from mtl_jax.training import evaluation, results, starting
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.prepare import Prepared, prepare, reseeded, stretches
from mtl_jax.training.signals import Stop, asked_to_stop

log = logging.getLogger(__name__)

RECORD = "ablation.json"


class Ready(NamedTuple):
    """A program before its first step.

    Attributes:
        program: Its runs.
        prepared: Its template, prepared.
        params: {seed: initial parameters}.
        begun: {seed: contents of init_from.json}, empty where nothing was loaded.
        machine: Its compiled programs.
        chunks: Its runs in chunks.
    """

    program: Program
    prepared: Prepared
    params: dict[int, Any]
    begun: dict[int, dict[str, Any]]
    machine: Machine
    chunks: list[list[Run]]

    def values(self, chunk: Sequence[Run]) -> Numbers:
        """The numbers of a chunk's runs, filled up to the machine's size with the last one's."""
        every = numbers.collect([run.experiment for run in self.program.runs])
        places = [self.program.runs.index(run) for run in chunk]
        places += [places[-1]] * (self.machine.size - len(places))
        return {name: array[np.array(places)] for name, array in every.items()}


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

    Args:
        experiment: What stays.
        workdir: Where everything is written: ablation.json, runs/NUMBER, and what all of them give together.
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
        UserError: Bad input, found before anything is compiled or written.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    folder = Path(workdir)
    planned = _planned(experiment, vary, methods, seeds, samples, own_order)
    before = _check_before(folder, planned)
    workdirs.check_writable(folder)
    record = before or {"name": experiment.name, "command": command, "axes": _axes(experiment, vary, samples)}
    done = {run["run"]: run["status"] for run in (before or {}).get("runs", [])}
    total = sum(_steps(program) * len(program.runs) for program in planned)
    with asked_to_stop() as stop:
        progress = Progress("ablation", total)
        told = [_told(program, done) for program in planned]
        for program in planned:
            if all(done.get(run.name, "waiting") != "waiting" for run in program.runs):
                progress.update(_steps(program) * len(program.runs))
                continue
            layout = (before or {}).get("programs", [])
            size = layout[program.number].get("size", 0) if layout else 0
            ready = make_ready(program, at_once, memory, size)
            _train(ready, folder, stop, progress, done, lambda: _write(folder, record, planned, told, done))
            told[program.number] |= {
                "size": ready.machine.size,
                "chunks": len(ready.chunks),
                "compile_seconds": round(ready.machine.compile_seconds, 1),
            }
        progress.close()
    return _write(folder, record, planned, told, done)


def _planned(
    experiment: Experiment, vary: Sequence[str], methods: Sequence[str], seeds: int, samples: str, own_order: bool
) -> list[Program]:
    if jax.process_count() > 1:
        raise UserError("an ablation trains on the devices of one process; start it without --distributed")
    axes = space.axes(experiment, vary, samples)
    return programs(runs(experiment, axes, methods, seeds, own_order=own_order))


def make_ready(program: Program, at_once: int = 0, memory: float = 0.0, size: int = 0) -> Ready:
    """Reads a program's data, makes the parameters of every seed, compiles its steps, and finds out how many runs fit.

    Args:
        program: The program.
        at_once: Most runs at once; 0: as many as fit.
        memory: GB of a device; 0: what there is.
        size: How many runs there were at once before a restart; 0: it begins now.

    Raises:
        UserError: The experiment is refused, or not even one run fits.
    """
    prepared = prepare(dataclasses.replace(program.template, devices=1))
    groups: dict[int, list[Run]] = {}
    for run in program.runs:
        groups.setdefault(order_of(run), []).append(run)
    most = max(len(group) for group in groups.values())
    mesh = meshes.make_for_runs(program.template.batch.rows, min(most, at_once or most), program.template.devices)
    prepared = prepared._replace(mesh=mesh)
    params, begun = {}, {}
    for seed in sorted({run.experiment.seed for run in program.runs}):
        one = reseeded(prepared, seed)
        if program.template.init_from.path:
            one, begun[seed], said = starting.begin(one)
            log.info("seed %d: %s", seed, said)
        params[seed] = one.params
    differs = together.differing(list(params.values()))
    every = numbers.collect([run.experiment for run in program.runs])
    made: dict[int, Machine] = {}

    def bytes_of(count: int) -> int:
        made[count] = Machine(prepared, differs, count)
        places = np.arange(count) % len(program.runs)
        values = jax.device_put({name: array[places] for name, array in every.items()}, meshes.by_runs(mesh))
        return made[count].weigh(values, meshes.assemble(_some_batch(prepared), meshes.by_rows(mesh)))

    apart = mesh.shape[meshes.RUN]
    limit = int(memory * 1e9) or sizes.memory()
    wanted = size or sizes.fit(bytes_of, min(most, at_once or most), apart, limit)
    parts, even = sizes.chunks(list(groups.values()), wanted, apart)
    machine = made[even] if even in made else Machine(prepared, differs, even)
    return Ready(program, prepared, params, begun, machine, parts)


def _some_batch(prepared: Prepared) -> Any:
    experiment = prepared.experiment
    batches = stream(prepared.corpus, experiment.batch, data_seed_of(experiment), stretches(experiment))
    batch = next(batches)
    batches.close()
    return batch


def _train(ready: Ready, folder: Path, stop: Stop, progress: Progress, done: dict[str, str], tell: Any) -> None:
    prepared, own = ready.prepared, folder / "programs" / str(ready.program.number)
    own.mkdir(parents=True, exist_ok=True)
    for note in prepared.notes:
        log.info("%s", note)
    trunks.save(prepared.trunk, own / "trunk")
    tables: list[jax.Array] = []

    def table() -> jax.Array:
        if not tables:
            parts = [part for split in prepared.corpus.splits.values() for part in split.values()]
            some = meshes.place(next(iter(ready.params.values())), meshes.replicated(prepared.mesh))
            found = evaluation.features(ready.machine.features, some, parts, prepared.experiment.batch, prepared.mesh)
            tables.append(meshes.place(found, meshes.replicated(prepared.mesh)))
        return tables[0]

    def run_folder(run: Run) -> Path:
        return folder / "runs" / run.name

    tell()
    kind = prepared.experiment.evaluation.baseline
    compared = results.baselines(prepared.corpus, kind, np.asarray(table()) if kind == "probe" else None)
    data = prepared.corpus.describe() | {"tasks": tasks_to_json(prepared.corpus.tasks)}
    shared = Shared(ready.machine, ready.params, table, run_folder, stop, progress)
    for number, chunk in enumerate(ready.chunks):
        if all(done.get(run.name, "waiting") != "waiting" for run in chunk):
            progress.update(_steps(ready.program) * len(chunk))
            continue
        for run in chunk:
            at = run_folder(run)
            at.mkdir(parents=True, exist_ok=True)
            files = {"config": to_json(run.experiment), "versions": workdirs.versions(), "data": data, "baselines": compared}
            if run.experiment.seed in ready.begun:
                files["init_from"] = ready.begun[run.experiment.seed]
            for name, value in files.items():
                workdirs.write_json(at / f"{name}.json", value)
        fates = Chunk(shared, chunk, ready.values(chunk), own / f"chunk-{number}").train()
        done |= {
            run.name: f"diverged {fate.diverged}" if fate.diverged else "done" for run, fate in zip(chunk, fates, strict=True)
        }
        tell()


def _steps(program: Program) -> int:
    return sum(phase.steps for phase in program.template.phases)


def _told(program: Program, done: dict[str, str]) -> dict[str, Any]:
    return {"program": program.number, "fixed": _fixed(program), "runs": len(program.runs), "steps": _steps(program)}


def _fixed(program: Program) -> dict[str, Any]:
    """What was varied and is the same in all of a program's runs."""
    first = program.runs[0].values
    return {name: value for name, value in first.items() if all(run.values.get(name, None) == value for run in program.runs)}


def _axes(experiment: Experiment, vary: Sequence[str], samples: str) -> list[dict[str, Any]]:
    return [
        {"fields": [".".join(path) for path in axis.paths], "values": [list(point) for point in axis.points]}
        for axis in space.axes(experiment, vary, samples)
    ]


def _write(
    folder: Path, record: dict[str, Any], planned: Sequence[Program], told: Sequence[dict[str, Any]], done: dict[str, str]
) -> dict[str, Any]:
    rows = sorted((run.name, program.number, run.values) for program in planned for run in program.runs)
    found = record | {
        "runs": [
            {"run": name, "values": values, "program": number, "status": done.get(name, "waiting")}
            for name, number, values in rows
        ],
        "programs": list(told),
        "devices": workdirs.versions()["devices"],
    }
    workdirs.create(folder)
    workdirs.write_json(folder / RECORD, found)
    return found


def _check_before(folder: Path, planned: Sequence[Program]) -> dict[str, Any] | None:
    """ablation.json of the same ablation, if it was begun.

    Raises:
        UserError: Another one was begun there, or the workdir is that of a run.
    """
    before = workdirs.read_json(folder / RECORD)
    if before is None:
        if (folder / "config.json").exists():
            raise UserError(f"{folder}: the workdir of a run; choose another --workdir for the ablation")
        return None
    wanted = {run.name: to_json(run.experiment) for program in planned for run in program.runs}
    there = {run["run"] for run in before["runs"]}
    for name, config in wanted.items():
        if name in there:
            workdirs.changed(folder / "runs" / name, config, False)
    if there != set(wanted):
        raise UserError(f"{folder}: begun with {len(there)} runs, and these are {len(wanted)}; choose another --workdir")
    return before
