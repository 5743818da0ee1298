"""A trained run, opened from its workdir as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import reason
from mtl_jax.data.source import Source
from mtl_jax.experiment import Experiment, select, unlabelled_sources
from mtl_jax.sharing.base import Hard
from mtl_jax.tasks import Task
from mtl_jax.training import checkpoint_files, frozen_params
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint_store import Best, Store
from mtl_jax.training.experiment_json import from_json, tasks_from_json
from mtl_jax.training.share_trunk import share_trunk
from mtl_jax.training.train_state import init_params
from mtl_jax.transfer.adapters.base import RUN
from mtl_jax.trunks import Trunk


class TrainedRun(NamedTuple):
    """A trained run as a model.

    Attributes:
        experiment: Its configuration, tasks selected.
        tasks: Its tasks, with the label sets of its data.
        trunk: The trunk; its parameters are in params.
        params: {"trunk": ..., "heads": {task: ...}} of one checkpoint, by default the best one, on the first device.
        step: The step of that checkpoint.
        dev: Its dev criterion; None where it is not known.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    trunk: Trunk
    params: Any
    step: int
    dev: float | None

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UserError: There is none.
        """
        tasks = {task.name: task for task in self.tasks}
        if name not in tasks:
            raise unknown("task", name, tasks)
        return tasks[name]

    def source(self, task: str) -> Source:
        """The source of a task."""
        return next(source for source in self.experiment.sources if source.name == self.task(task).source)

    @property
    def sources(self) -> list[str]:
        """The names of the sources that the run has tasks on, in its order."""
        used = {task.source for task in self.tasks} | set(unlabelled_sources(self.experiment))
        return [source.name for source in self.experiment.sources if source.name in used]

    def source_index(self, task: str) -> int:
        """The index of a task's source in `sources`."""
        return self.sources.index(self.task(task).source)

    def tasks_of_same_source(self, task: str) -> list[Task]:
        """The tasks of a task's source, itself included: all of them decide how its texts are read, as in training."""
        return [other for other in self.tasks if other.source == self.task(task).source]


def is_workdir(folder: Path) -> bool:
    """Whether a directory is the workdir of a run."""
    return (folder / "data.json").exists() and (folder / "config.json").exists()


def open_run(folder: Path, step: str = "best") -> TrainedRun:
    """A checkpoint of a run.

    Args:
        folder: Its workdir.
        step: best (by dev), last, or the number of a step that has a checkpoint.

    Raises:
        UserError: The directory is not a workdir, or has no such checkpoint.
    """
    config, data = workdirs.read_json(folder / "config.json"), workdirs.read_json(folder / "data.json")
    if config is None or data is None:
        raise UserError(f"{folder}: not the workdir of a run (config.json or data.json is missing)")
    experiment = select(from_json(config, str(folder / "config.json")))
    tasks = tasks_from_json(data["tasks"], str(folder / "data.json"))
    if [task.name for task in tasks] != [task.name for task in experiment.tasks]:
        raise workdirs.damaged(folder / "data.json", "its tasks are not those of config.json")
    trunk = trunks.reopen(experiment.trunk, folder / "trunk", meshes.compute_dtype(experiment.dtype))
    used = {task.source for task in tasks} | set(unlabelled_sources(experiment))
    trunk = share_trunk(trunk, experiment, tasks, [source.name for source in experiment.sources if source.name in used])
    checkpoint = _read(folder, experiment, step)
    _check_sizes(folder, trunk, tasks, checkpoint)
    heads = {task.name: {} for task in tasks} | checkpoint.value.get("heads", {})  # a head may have no parameter
    params = jax.device_put({**checkpoint.value, "heads": heads}, jax.devices()[0])
    return TrainedRun(experiment, tasks, trunk, params, checkpoint.step, checkpoint.dev)


def _check_sizes(folder: Path, trunk: Trunk, tasks: tuple[Task, ...], checkpoint: Best) -> None:
    """Compares the sizes in trunk/ and data.json with those of the parameters.

    Raises:
        UserError: They are not the same.
    """
    where = f"{folder}: trunk/, data.json and the parameters of step {checkpoint.step}"
    advice = "one of them is not what mtl_jax wrote; put the workdir back, or delete its results.json and let the run end again"
    try:
        expected = trees.flat(trunks.shapes(trunk, lambda trunk: init_params(trunk, tasks, 0)))
    # A module with impossible sizes raises errors of many kinds.
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, LookupError, AssertionError) as error:
        raise UserError(f"{where} do not fit together ({reason(error)}): {advice}") from error
    leaves = trees.flat(checkpoint.value)
    for path, leaf in expected.items():
        shape = tuple(leaves[path].shape) if path in leaves else "absent"
        if shape != tuple(leaf.shape):
            sizes = f"{path} is {tuple(leaf.shape)} by the first two, {shape} in the last"
            raise UserError(f"{where} do not fit together ({sizes}): {advice}")


def open_finished(folder: Path, where: str) -> TrainedRun:
    """The best checkpoint of a finished run, to be applied to rows of any source.

    Args:
        folder: Its workdir.
        where: The field that names it, for errors.

    Raises:
        UserError: It is not a workdir, the run is not finished, or each of its sources has its own adapters.
    """
    run = open_best(folder, where)
    separate = [adapter.name for adapter in run.experiment.adapters if adapter.per != RUN]
    if not isinstance(run.experiment.sharing, Hard):
        raise UserError(
            f"{where}: the tasks of the run in {folder} share its trunk by {type(run.experiment.sharing).__name__}, which "
            "knows only the rows of its own tasks; name a run with sharing Hard()"
        )
    if separate:
        raise UserError(
            f"{where}: each source of the run in {folder} has its own adapters ({', '.join(separate)}), and none of them is "
            "for the rows of this run; name a run with shared adapters, or without adapters"
        )
    return run


def open_best(folder: Path, where: str) -> TrainedRun:
    """The best checkpoint of a finished run, whatever shares its trunk.

    Args:
        folder: Its workdir.
        where: The field that names it, for errors.

    Raises:
        UserError: It is not a workdir, or the run is not finished.
    """
    if not is_workdir(folder):
        raise UserError(f"{where}: {folder} is not the workdir of a run")
    if not (folder / "results.json").exists():
        raise UserError(f"{where}: the run in {folder} is not finished (it has no results.json); let it end first")
    return open_run(folder)


def _read(folder: Path, experiment: Experiment, step: str) -> Best:
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: there is no checkpoint yet")
    criterion, declared = experiment.evaluation.criterion, experiment.trunk

    def load_trunk() -> Any:
        return {"trunk": trunks.build(declared, (), np.float32).params}

    trunk_source = frozen_params.TrunkSource(load_trunk, getattr(declared, "path", ""))
    store = Store(folder, experiment.checkpoints, read_only=True, criterion=criterion, trunk_source=trunk_source)
    try:
        steps = store.steps()
        if step == "best":
            best = store.best(store.restore_params)
            if best is None:
                raise UserError(f"{folder}: there is no readable checkpoint that has been evaluated on dev")
            return best
        if not steps or (step != "last" and not (checkpoint_files.is_step(step) and int(step) in steps)):
            raise UserError(f"{folder}: there is no checkpoint of step {step}; there are {listed(steps)}")
        number = steps[-1] if step == "last" else int(step)
        return Best(number, None, store.restore_params(number))
    finally:
        store.close()
