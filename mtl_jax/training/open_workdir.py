"""A workdir opened to be trained in: everything is read, checked and locked before anything is written."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.experiment import Experiment, keep_head_weights
from mtl_jax.experiment_json import tasks_to_json, to_json, with_defaults
from mtl_jax.training import hosts, init_from, results
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.setup import Prepared, prepare


class Opened(NamedTuple):
    """What is known before anything is written: results, or a run that begins or resumes.

    Attributes:
        config: The contents of config.json.
        done: The contents of results.json, where the workdir is done.
        prepared: Else the run.
        changed: Whether the workdir was begun with another configuration.
        data: The contents of data.json.
        begun: The contents of init_from.json, where the run begins from other parameters now; else {}.
        trunk: {"trunk": ...} as it was loaded.
    """

    config: dict[str, Any]
    done: dict[str, Any]
    prepared: Prepared | None = None
    changed: bool = False
    data: Any = None
    begun: Any = None
    trunk: Any = None


def open_workdir(experiment: Experiment, folder: Path, allow_config_change: bool, stack: contextlib.ExitStack) -> Opened:
    """Reads and checks everything that a run needs.

    Args:
        experiment: The experiment.
        folder: The workdir.
        allow_config_change: Whether the workdir may have been begun with another configuration.
        stack: Holds the lock of the workdir, which the first host takes for all.

    Raises:
        UserError: Bad input; or another process trains in the workdir.
    """
    workdirs.check_writable(folder)
    if hosts.index() == 0:
        stack.enter_context(locks.workdir(folder))
    if (folder / workdirs.MERGED).exists():
        raise UserError(
            f"{folder}: a merged model; to train it, begin from it in another --workdir by --init-from.path {folder}"
        )
    if not allow_config_change:
        experiment = keep_head_weights(experiment, workdirs.read_json(folder / "config.json"))
    config = to_json(experiment)
    changed = workdirs.changed(folder, config, allow_config_change, with_defaults)
    for name in ("ablation.json", "results.json"):  # a report has one, too, and is no finished run
        if (folder / name).exists() and not (folder / "config.json").exists():
            raise UserError(
                f"{folder}: not the workdir of a run ({name} is there, config.json is not); choose another --workdir"
            )
    if (folder / "results.json").exists() and not changed:
        return Opened(config, results.read(folder))
    prepared = prepare(experiment)
    data = prepared.corpus.describe() | {"tasks": tasks_to_json(prepared.corpus.tasks)}
    if not changed:
        workdirs.check_data(folder, data)
    trunk = {"trunk": prepared.trunk.params}
    begun: dict[str, Any] = {}
    if experiment.init_from.path and not workdirs.has_checkpoints(folder):
        prepared, begun, said = init_from.begin(prepared)
        prepared = prepared._replace(notes=[*prepared.notes, said])
    return Opened(config, {}, prepared, changed, data, begun, trunk)
