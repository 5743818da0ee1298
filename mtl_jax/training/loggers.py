"""Loggers: where the metrics of a run also go, such as Weights & Biases. Each is a factory of Hooks, known by its name.

Ours are for services whose packages are optional. metrics.jsonl and TensorBoard's files are always written.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import reason
from mtl_jax.core.hooks import Hooks
from mtl_jax.core.parts import Registry
from mtl_jax.training import workdir as workdirs

log = logging.getLogger(__name__)

Factory = Callable[[Mapping[str, Any], Path], Hooks]

RECORD = "loggers.json"  # in the workdir: {logger: its record}
AT_ONCE = 500  # most metrics or parameters in a request to MLflow


def wandb_logger(config: Mapping[str, Any], workdir: Path) -> Hooks:
    """Weights & Biases: the project is $WANDB_PROJECT, or the experiment's name; a resumed run continues its record."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", config["name"])
    same_run = kept(workdir, "wandb").get("id")
    run = wandb.init(project=project, name=workdir.name, config=dict(config), dir=str(workdir), id=same_run, resume="allow")
    keep(workdir, "wandb", {"id": run.id})
    # A resumed run repeats the steps after its checkpoint, and wandb's own step may only grow.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Hooks(
        after_metrics=lambda step, metrics: run.log({"step": step, **_numbers("train", metrics)}),
        after_evaluation=lambda step, scores: run.log({"step": step, **_numbers("dev", scores)}),
        at_end=lambda results: run.summary.update(scores_on_test(results)),
        close=run.finish,
    )


def trackio_logger(config: Mapping[str, Any], workdir: Path) -> Hooks:
    """Trackio: the project is the experiment's name; a resumed run continues the run of its name."""
    import trackio

    name = kept(workdir, "trackio").get("name") or f"{workdir.name}-{int(time.time())}"
    run = trackio.init(project=config["name"], name=name, config=dict(config), resume="allow")
    keep(workdir, "trackio", {"name": name})
    return Hooks(
        after_metrics=lambda step, metrics: run.log(_numbers("train", metrics), step=step),
        after_evaluation=lambda step, scores: run.log(_numbers("dev", scores), step=step),
        at_end=lambda results: run.log(scores_on_test(results), step=results["steps"]),
        close=run.finish,
    )


def mlflow_logger(config: Mapping[str, Any], workdir: Path) -> Hooks:
    """MLflow, at $MLFLOW_TRACKING_URI: the experiment of this name; metrics are sent at evaluations and at the end."""
    import mlflow
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    client, waiting, status = mlflow.MlflowClient(), list[Any](), "KILLED"
    run_id = kept(workdir, "mlflow").get("id")
    if run_id is None:
        experiment = client.get_experiment_by_name(config["name"])
        number = client.create_experiment(config["name"]) if experiment is None else experiment.experiment_id
        run_id = client.create_run(number, run_name=workdir.name).info.run_id
        keep(workdir, "mlflow", {"id": run_id})
        parameters = [Param(name, str(value)[:500]) for name, value in _leaves("", config)]
        for first in range(0, len(parameters), AT_ONCE // 5):
            client.log_batch(run_id, params=parameters[first : first + AT_ONCE // 5])
    else:
        client.update_run(run_id, status="RUNNING")

    def add(step: int, metrics: Mapping[str, float]) -> None:
        waiting.extend(Metric(name, value, int(1000 * time.time()), step) for name, value in metrics.items())

    def send(ends: str = "") -> None:
        try:
            while waiting:
                client.log_batch(run_id, metrics=waiting[:AT_ONCE])
                del waiting[:AT_ONCE]
            if ends:
                client.set_terminated(run_id, ends)
        except MlflowException as error:  # a server that does not answer for a while must not end the run
            log.warning("logger mlflow: %s; %d metrics are not sent yet", reason(error), len(waiting))

    def after_evaluation(step: int, scores: Mapping[str, Any]) -> None:
        add(step, _numbers("dev", scores))
        send()

    def at_end(results: Mapping[str, Any]) -> None:
        nonlocal status
        add(results["steps"], scores_on_test(results))
        status = "FINISHED"

    return Hooks(
        after_metrics=lambda step, metrics: add(step, _numbers("train", metrics)),
        after_evaluation=after_evaluation,
        at_end=at_end,
        close=lambda: send(status),
    )


LOGGERS: Registry[Factory] = Registry("logger", {"wandb": wandb_logger, "trackio": trackio_logger, "mlflow": mlflow_logger})


def register_logger(name: str) -> Callable[[Factory], Factory]:
    """A decorator that registers a logger: a function (config, workdir) -> Hooks, where config is that of config.json.

    It is called on host 0 when a run begins or resumes, and chosen by --logger NAME or train(..., loggers=["NAME"]).

    Raises:
        UserError: The name is taken.

    Examples:
        >>> @mtl_jax.register_logger("lines")
        ... def lines(config, workdir):
        ...     file = open(workdir / "lines.txt", "a")
        ...     write = lambda step, scores: print(step, scores["criterion"], file=file)
        ...     return mtl_jax.Hooks(after_evaluation=write, close=file.close)
        >>> results = mtl_jax.train(EXPERIMENT, "runs/with_lines", loggers=["lines"])
        >>> len(Path("runs/with_lines/lines.txt").read_text().splitlines())
        3
    """
    return LOGGERS.register(name)


def checked(loggers: Sequence[str]) -> tuple[str, ...]:
    """The names of loggers, of a list or of texts with commas between names, each once.

    Raises:
        UserError: There is no such logger, or its package is not installed.
    """
    texts = [loggers] if isinstance(loggers, str) else loggers
    names = tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"{unknown('logger', name, LOGGERS)}; --import FILE brings a logger of your own")
        factory = LOGGERS[name]
        if factory.__module__ == __name__ and importlib.util.find_spec(name) is None:
            raise UserError(f"logger {name}: the package {name} is not installed; pip install 'mtl_jax[{name}]'")
    return names


def open_loggers(names: Sequence[str], config: Mapping[str, Any], workdir: Path) -> list[Hooks]:
    """The hooks of each logger, in order; those that were opened are closed if a later one cannot be opened.

    Args:
        names: Their names, checked.
        config: The contents of config.json.
        workdir: The workdir of the run.

    Raises:
        UserError: A factory returned something else than Hooks.
    """
    opened: list[Hooks] = []
    try:
        for name in names:
            hooks = _opened(name, config, workdir)
            if not isinstance(hooks, Hooks):
                raise UserError(f"logger {name}: its function returned {type(hooks).__name__}; it must return mtl_jax.Hooks")
            opened.append(hooks)
    except BaseException:
        for hooks in opened:
            if hooks.close is not None:
                hooks.close()
        raise
    return opened


def _opened(name: str, config: Mapping[str, Any], workdir: Path) -> Hooks:
    factory = LOGGERS[name]
    if factory.__module__ != __name__:
        return factory(config, workdir)
    try:
        return factory(config, workdir)
    except UserError:
        raise
    except Exception as error:  # each package has its own kinds of errors
        raise UserError(f"logger {name}: {type(error).__name__}: {reason(error)}") from error


def kept(workdir: Path, logger: str) -> dict[str, Any]:
    """What keep() stored for a logger in this workdir; {} before that."""
    return dict((workdirs.read_json(workdir / RECORD) or {}).get(logger, {}))


def keep(workdir: Path, logger: str, record: Mapping[str, Any]) -> None:
    """Stores JSON values for a logger in the workdir, such as the id under which a resumed run continues."""
    records = workdirs.read_json(workdir / RECORD) or {}
    workdirs.write_json(workdir / RECORD, {**records, logger: dict(record)})


def scores_on_test(results: Mapping[str, Any]) -> dict[str, float]:
    """{"test/TASK/METRIC": value} of the contents of results.json."""
    tasks = results["tasks"]
    return {name: value for task in tasks for name, value in _numbers(f"test/{task}", tasks[task]["test"]).items()}


def _numbers(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among values, with the kind before their names."""
    finite = {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {f"{kind}/{name}": value for name, value in finite.items()}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of each number, text and the like in a tree of JSON values."""
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    if children is None:
        yield path, value
        return
    for name, child in children:
        yield from _leaves(f"{path}.{name}" if path else str(name), child)
