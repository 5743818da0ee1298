"""Copies one run of an ablation to an ordinary workdir with checkpoints, to predict, convert or resume."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from mtl_jax.ablation import ablation_dir as folders
from mtl_jax.ablation import stacking
from mtl_jax.ablation.ablate import share
from mtl_jax.ablation.chunk import Chunk
from mtl_jax.ablation.prepare_program import make_ready
from mtl_jax.ablation.stacking import Together
from mtl_jax.core import locks, log_lines, trees
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.progress import Progress
from mtl_jax.core.staging import staged
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import check_functions
from mtl_jax.training.preemption import Stop


def take(ablation: str | Path, name: str, target: str | Path) -> Path:
    """Writes a run's files, its trunk, and its best and newest checkpoints to a workdir; returns the workdir.

    Args:
        ablation: The workdir of the ablation, which may still be running.
        name: The run's number, such as "0007".
        target: The directory to write; it must not exist.

    Raises:
        UserError: There is no such ablation or run, the run has no checkpoint yet or diverged before its first evaluation, the
            target exists, or another process is writing it.

    Examples:
        >>> workdir = mtl_jax.take("runs/ablation", "0001", "runs/taken")
        >>> sorted(mtl_jax.predict(workdir, "coarse", ["who is the man ?"])[0])
        ['label', 'probability']
    """
    log_lines.show()
    with locks.target(Path(target)):
        _take(Path(ablation), name, Path(target))
    return Path(target)


def _take(folder: Path, name: str, out: Path) -> None:
    record = folders.read(folder)
    names = [run["run"] for run in record["runs"]]
    if name not in names:
        raise unknown(f"run of {folder}:", name, names)
    if out.exists():
        raise UserError(f"{out}: is there already; choose another directory")
    check_functions(folders.of_run(folder, name))
    planned = folders.read_programs(folder, record)
    program = next(program for program in planned if name in [run.name for run in program.runs])
    size = record["programs"][program.number].get("size", 0)
    if not size:
        raise UserError(f"{folder}: run {name} has not begun")
    ready = make_ready(program, size=size, trains=False)
    place = next(place for place, runs in enumerate(ready.chunks) if name in [run.name for run in runs])
    chunk_folder = folders.of_chunk(folder, program.number, place)
    with contextlib.closing(Progress("", 1)) as progress:
        shared = share(ready, folder, Stop(), progress)
        chunk = Chunk(shared, ready.chunks[place], ready.values(ready.chunks[place]), chunk_folder)
        newest = chunk.newest() if (chunk_folder / "checkpoints").is_dir() else None
    if newest is None:
        raise UserError(f"{folder}: there is no checkpoint of run {name} yet")
    number = [run.name for run in chunk.runs].index(name)
    status = chunk.statuses[number]
    if status.diverged and status.best is None:
        diverged = f"run {name} diverged {status.diverged}, before its first evaluation"
        raise UserError(f"{folder}: {diverged}; there is nothing to copy")
    with staged(out) as part:
        shutil.copytree(folder / "runs" / name, part, dirs_exist_ok=True)
        shutil.copytree(folders.of_program(folder, program.number) / "trunk", part / "trunk")
        _write_checkpoints(chunk, newest, number, part)


def _write_checkpoints(chunk: Chunk, newest: Together, number: int, folder: Path) -> None:
    experiment, status = chunk.runs[number].experiment, chunk.statuses[number]
    per_run = chunk.machine.per_run[chunk.counts.phase]
    step = int(newest.step)
    counts = dataclasses.replace(
        chunk.counts, criterion=experiment.evaluation.criterion, best=status.best, evaluations_since_best=status.since_best
    )
    record = {"counts": dataclasses.asdict(counts), "references": chunk.references[number].digests}
    position = chunk.stream.get_state()
    with contextlib.closing(Store(folder, experiment.checkpoints, criterion=experiment.evaluation.criterion)) as store:
        last = _on_first_device(stacking.take_state(newest.state(), per_run, number))
        if status.best is not None and status.best_step < step:
            best = stacking.take(trees.merge(newest.best, newest.params), per_run, number)
            measured = last._replace(
                step=jax.numpy.asarray(status.best_step, "int32"), params=_on_first_device(best), average=None
            )
            # The moments of that step are not known, so the checkpoint has no position in the data and cannot be resumed.
            store.save(status.best_step, measured, record | {"step": status.best_step, "data": []}, status.best)
        if not status.diverged:
            dev = status.best if status.best_step == step else None
            store.save(step, last, record | {"step": step, "data": [position]}, dev)
        store.wait()


def _on_first_device(tree: Any) -> Any:
    return jax.device_put(jax.device_get(tree), jax.devices()[0])
