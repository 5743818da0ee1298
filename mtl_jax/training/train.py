"""Training in a workdir: it is locked, and everything is read and checked, before anything is written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mtl_jax import trunks
from mtl_jax.audit import earlier_runs
from mtl_jax.core import locks, log_lines, script_calls
from mtl_jax.core.errors import UserError
from mtl_jax.core.hooks import Callbacks, Hooks, several
from mtl_jax.core.row_texts import hiding
from mtl_jax.experiment import Experiment, keep_head_weights
from mtl_jax.training import fingerprint, frozen_params, hosts, initial_parameters, results
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import data_to_json, data_with_defaults, to_json, with_defaults
from mtl_jax.training.loggers import checked, open_loggers
from mtl_jax.training.loop import TrainingRun
from mtl_jax.training.preemption import stop_on_signals
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.setup import earlier_workdirs, prepare

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A workdir before anything is written in it: finished, or with a run that begins or resumes.

    Attributes:
        config: The contents of config.json.
        results: The contents of results.json, where the run is finished; else {}.
        prepared: The run; None where it is finished.
        config_changed: Whether the workdir was begun with another configuration.
        data: The contents of data.json.
        records: {file: its contents}: where parameters are from, if the run begins now with loaded ones; else {}.
        trunk: {"trunk": ...} as it was loaded.
    """

    config: dict[str, Any]
    results: dict[str, Any]
    prepared: Prepared | None = None
    config_changed: bool = False
    data: Any = None
    records: Any = None
    trunk: Any = None


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    allow_config_change: bool = False,
    hooks: Hooks | Iterable[Hooks] = (),
    loggers: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains an experiment in a workdir; resumes where an earlier process stopped, with the same numbers.

    Args:
        experiment: The experiment.
        workdir: Where everything is written. A finished run is not trained again.
        allow_config_change: Resume in a workdir that was begun with another configuration.
        hooks: Functions to be called during the run; one Hooks or several. They are not part of the experiment.
        loggers: Names of loggers that the metrics also go to, such as "wandb"; see register_logger.

    Returns:
        The contents of results.json.

    Raises:
        UserError: Bad input, found before anything is written; or a loss that is not finite.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
        Any error of a hook: The state is saved, and the same command resumes.

    Examples:
        >>> results = mtl_jax.train(dataclasses.replace(EXPERIMENT, seed=1), "runs/seed_1")
        >>> sorted(results["tasks"])
        ['coarse', 'fine']
    """
    if script_calls.until_train.get():
        raise script_calls.Read(experiment)
    log_lines.show()
    folder = Path(workdir)
    all_hooks, logger_names = several(hooks), checked(loggers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hiding(experiment.private))
        opened = hosts.make_and_compare(
            lambda: open_workdir(experiment, folder, allow_config_change, stack),
            lambda opened: fingerprint.facts(opened.config, folder, opened.prepared),
        )
        if opened.prepared is None:
            log.info("%s is done", folder)
            return opened.results
        stack.enter_context(hosts.fail_together())
        workdirs.create(folder)
        hosts.check_shared(folder)
        return _train(opened.prepared, opened, folder, all_hooks, logger_names)


def open_workdir(experiment: Experiment, folder: Path, allow_config_change: bool, stack: contextlib.ExitStack) -> Opened:
    """Reads and checks everything that a run needs.

    Args:
        experiment: The experiment.
        folder: The workdir.
        allow_config_change: Whether the workdir may have been begun with another configuration.
        stack: Keeps the lock of the workdir, which host 0 takes for all.

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
    config_changed = workdirs.config_changed(folder, config, allow_config_change, with_defaults)
    for name in ("ablation.json", "results.json"):  # a report has a results.json, too, but is not the workdir of a run
        if (folder / name).exists() and not (folder / "config.json").exists():
            raise UserError(
                f"{folder}: not the workdir of a run ({name} is there, config.json is not); choose another --workdir"
            )
    if (folder / "results.json").exists() and not config_changed:
        return Opened(config, results.read(folder))
    prepared = prepare(experiment)
    data = data_to_json(prepared.corpus.describe(), experiment, prepared.corpus.tasks, prepared.copies)
    if not config_changed:
        workdirs.check_data(folder, data, data_with_defaults)
    trunk = {"trunk": prepared.trunk.params}
    records: dict[str, Any] = {}
    if not workdirs.has_checkpoints(folder):
        prepared, records, notes = initial_parameters.load(prepared)
        prepared = prepared._replace(notes=[*prepared.notes, *notes])
    return Opened(config, {}, prepared, config_changed, data, records, trunk)


def _train(
    prepared: Prepared, opened: Opened, folder: Path, hooks: Sequence[Hooks], logger_names: Sequence[str]
) -> dict[str, Any]:
    experiment = prepared.experiment
    trunk_source = frozen_params.TrunkSource(lambda: opened.trunk, getattr(experiment.trunk, "path", ""))
    store = Store(folder, experiment.checkpoints, criterion=experiment.evaluation.criterion, trunk_source=trunk_source)
    with contextlib.closing(store), stop_on_signals(raise_at_end=True) as stop:
        run = TrainingRun(prepared, folder, store, stop, params_loaded=bool(opened.records))
        state, step = run.resume()  # before this configuration is written: it may not fit the checkpoints
        hosts.check_same([("checkpoint", {"step": step})])
        if opened.config_changed and step == prepared.plans[-1].end and store.best(lambda step: step) is None:
            raise UserError(
                f"{folder}: all steps are done, and no checkpoint was evaluated by evaluation.criterion "
                f"{experiment.evaluation.criterion!r}: leave it as it was, or choose another --workdir"
            )
        if not experiment.checkpoints.frozen:
            masks = (plan.mask for plan in prepared.plans)
            store.omitted = frozen_params.untrained_hashes(masks, prepared.placement.on_host(state.params), opened.trunk)
        if opened.config_changed:
            workdirs.remove_results(folder)
        for name, value in (("config", opened.config), ("versions", workdirs.versions()), ("data", opened.data)):
            workdirs.write_json(folder / f"{name}.json", value)
        for name, value in (opened.records or {}).items():
            workdirs.write_json(folder / name, value)
        if jax.process_index() == 0:
            trunks.save(prepared.trunk, folder / "trunk")
            if not experiment.private:
                train = {name: examples.data for name, examples in prepared.corpus.splits["train"].items()}
                earlier_runs.write(folder, experiment.sources, train, [path for _, path in earlier_workdirs(experiment)])
        for note in prepared.notes:
            log.info("%s", note)
        if jax.process_index() != 0:
            return run.train(state, step)
        callbacks = Callbacks([*open_loggers(logger_names, opened.config, folder), *hooks], stop.request)
        with callbacks.closing():
            return run.train(state, step, callbacks)
