"""What a run loads into its initial parameters before its first step: by init_from, and what its sharing takes of other runs.

A run that resumes has all of it in its checkpoints, and needs none of those runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunk_compatibility
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count
from mtl_jax.experiment import Experiment
from mtl_jax.sharing.base import NAME, Sharing, TrainedTrunk
from mtl_jax.training import init_from, restore
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.restore import TrainedRun
from mtl_jax.training.train_state import on_host
from mtl_jax.transfer.adapters import ADAPTERS

SHARING_RECORD = "sharing.json"
_PURPOSE = "share parameters"


class Loaded(NamedTuple):
    """A run whose initial parameters are complete.

    Attributes:
        prepared: The run.
        records: {file of the workdir: its contents}: where the parameters are from; {}: nothing was loaded.
        notes: Lines for the log.
    """

    prepared: Prepared
    records: dict[str, dict[str, Any]]
    notes: list[str]


def load(prepared: Prepared) -> Loaded:
    """Loads what an experiment names.

    Args:
        prepared: The run with the initial parameters of its trunk and seed.

    Raises:
        UserError: A run that is named cannot be opened, or does not fit.
    """
    records: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    if prepared.experiment.init_from.path:
        prepared, records[init_from.RECORD], note = init_from.load_parameters(prepared)
        notes.append(note)
    if _sharing_loads(prepared.experiment):
        prepared, records[SHARING_RECORD], lines = _load_sharing(prepared)
        notes.extend(lines)
    return Loaded(prepared._replace(params=on_host(prepared.params)) if records else prepared, records, notes)


def origin(experiment: Experiment) -> str:
    """The runs from which initial parameters are loaded, for errors; "" if nothing is loaded."""
    paths = [experiment.init_from.path] if experiment.init_from.path else []
    if _sharing_loads(experiment):
        paths += experiment.sharing.earlier_runs() or [f"what {type(experiment.sharing).__name__} loads"]
    return ", ".join(paths)


def _sharing_loads(experiment: Experiment) -> bool:
    return type(experiment.sharing).loaded is not Sharing.loaded


def _load_sharing(prepared: Prepared) -> tuple[Prepared, dict[str, Any], list[str]]:
    sharing, kind = prepared.experiment.sharing, type(prepared.experiment.sharing).__name__
    trunk = dict(prepared.params["trunk"])
    adapters = dict(trunk.pop(ADAPTERS))
    notes: list[str] = []
    opened: dict[str, TrainedTrunk] = {}
    record: dict[str, Any] = {"kind": kind, "runs": {}}
    for path in dict.fromkeys(sharing.earlier_runs()):
        run = restore.open_best(Path(path), f"sharing: runs of {kind}")
        _check_trunk(prepared, path, run)
        opened[path] = _trained_trunk(path, run)
        facts = {"experiment": run.experiment.name, "seed": run.experiment.seed, "step": run.step, "dev": run.dev}
        differing = _differing(trunk, opened[path].params)
        record["runs"][path] = {**facts, "differing": differing}
        notes.append(f"sharing: parameters of {path}, step {run.step}")
        if differing:
            notes.append(
                f"sharing: {count(len(differing), 'parameter')} of the trunk of {path}, such as {differing[0]}, differ from "
                "this run's, and its adapter learned with its own: begin from it by init_from, or train such runs by "
                "adapters_only()"
            )
    before = trees.flat(adapters[NAME])
    after = trees.flat(sharing.loaded(adapters[NAME], trunk, [opened[path] for path in sharing.earlier_runs()]))
    for path in [*before, *after]:
        shapes = [tuple(leaves[path].shape) if path in leaves else "absent" for leaves in (before, after)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"sharing: loaded() of {kind} must keep shapes, but changes that of {path} from {shapes[0]} to {shapes[1]}"
            )
    adapters[NAME] = trees.nested({path: np.asarray(after[path]).astype(leaf.dtype) for path, leaf in before.items()})
    params = {**prepared.params, "trunk": {**trunk, ADAPTERS: adapters}}
    return prepared._replace(params=params), record, notes


def _trained_trunk(path: str, run: TrainedRun) -> TrainedTrunk:
    numbers = {task.name: run.source_index(task.name) for task in run.tasks}
    params = jax.tree.map(np.asarray, jax.device_get(run.params["trunk"]))
    return TrainedTrunk(path, run.trunk.module, params, run.experiment.adapters, run.experiment.sharing, numbers)


def _check_trunk(prepared: Prepared, path: str, run: TrainedRun) -> None:
    """Raises UserError where another run's trunk is of another family, other sizes, or another vocabulary."""
    names = ("this experiment", path)
    both = (trunk_compatibility.of_trunk(prepared.trunk), trunk_compatibility.of_trunk(run.trunk))
    trunk_compatibility.check_family(names, both, _PURPOSE)
    trunk_compatibility.check_constants(names, both, _PURPOSE)
    trunk_compatibility.check_vocabulary(names, both, _PURPOSE)


def _differing(trunk: Any, other: Any) -> list[str]:
    """The paths of the parameters in which two trunks differ, adapters left out."""
    leaves = trees.flat({name: tree for name, tree in other.items() if name != ADAPTERS})
    return [
        f"trunk/{path}"
        for path, leaf in trees.flat(trunk).items()
        if path not in leaves or not np.array_equal(np.asarray(leaf), leaves[path])
    ]
