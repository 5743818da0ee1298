"""From workdirs to a Study: runs, what varies between them, their scores and curves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.core.errors import UserError, listed
from mtl_jax.experiment import select
from mtl_jax.report.series import Series, of_records
from mtl_jax.training.experiment_json import from_json
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.workdir import differences, read_json, read_results

ABLATION = "ablation.json"  # a directory that holds it is an ablation: its runs are in runs/
DONE = "done"
SPLITS = ("dev", "test")
# Fields of an experiment that say where a run is and how it is kept, not what it does.
NO_PART_OF_A_RUN = ("name", "seed", "devices", "checkpoints")
BY_NAME = ("weights", "shares", "class_weights")  # these hold a number for each task, source or label, and are one field

Scores = Mapping[str, Mapping[str, float]]  # {task: {metric: value}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Of its workdir.
        values: {varied field: value}, without the seed.
        seed: The seed; None where nothing says it.
        status: done; running, waiting or unfinished; or "diverged at step ...".
        method: The weighting rule.
        weights: {task: weight} where they are numbers that do not change, else empty.
        scores: {"dev" and "test": {task: {metric: value}}} of the best checkpoint; empty where there are none.
        baselines: {task: {baseline: {metric: value}}} on test.
        facts: The rest of results.json.
        curves: What series.of_records returns.
        phases: The first step of every phase but the first.
    """

    name: str
    values: Mapping[str, Any]
    seed: int | None
    status: str
    method: str
    weights: Mapping[str, float]
    scores: Mapping[str, Scores]
    baselines: Mapping[str, Scores]
    facts: Mapping[str, Any]
    curves: Mapping[str, Series]
    phases: tuple[int, ...]

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return self.status == DONE

    @property
    def diverged(self) -> bool:
        """Whether a loss or gradient was not finite."""
        return self.status.startswith("diverged")


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a report is made from.

    Attributes:
        name: Of the ablation, or of the runs' experiment.
        command: What started it; empty for ordinary runs.
        fields: The varied fields in order, without the seed.
        tasks: {task: the metric that stands for it}.
        criterion: What makes one better than another on dev: evaluation.criterion of the runs, mean where it differs.
        runs: In order of their names as given.
        programs: Of ablation.json.
        devices: What it ran on.
        versions: Of the programs that it ran with.
    """

    name: str
    command: str
    fields: tuple[str, ...]
    tasks: Mapping[str, str]
    criterion: str
    runs: tuple[Run, ...]
    programs: tuple[Mapping[str, Any], ...]
    devices: str
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Files:
    """The files of one run, parsed; of what is not there, {}."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def tasks(self) -> dict[str, str]:
        """{task: its metric}; read from the configuration where the run is not finished."""
        if self.results:
            return {name: task["metric"] for name, task in self.results["tasks"].items()}
        where = str(self.folder / "config.json")
        return {task.name: task.metric for task in select(from_json(self.config, where)).tasks} if self.config else {}


def read(workdirs: Sequence[Path]) -> Study:
    """What is to be reported.

    Args:
        workdirs: One ablation, or workdirs of ordinary runs.

    Raises:
        UserError: There are none, one is no workdir, or one trains other tasks than the others.
    """
    if not workdirs:
        raise UserError("no workdir given")
    for folder in workdirs:
        if (folder / ABLATION).exists() and len(workdirs) > 1:
            raise UserError(f"{folder} is an ablation: a report is of one ablation, or of ordinary runs")
    return _ablation(workdirs[0]) if (workdirs[0] / ABLATION).exists() else _ordinary(workdirs)


def _ablation(folder: Path) -> Study:
    index = read_json(folder / ABLATION)
    files = [_files(folder / "runs" / entry["run"], there=False) for entry in index["runs"]]
    axes = [field for axis in index["axes"] for field in axis["fields"]]
    others = [field for entry in index["runs"] for field in entry["values"]]
    fields = _varied(["weighting", *axes, *others], [entry["values"] for entry in index["runs"]])
    tasks = _tasks(files)
    runs = tuple(
        _run(run, entry["run"], tasks, fields, entry["values"], entry["status"])
        for run, entry in zip(files, index["runs"], strict=True)
    )
    return _study(index["name"], files, runs, fields, tasks, index)


def _ordinary(workdirs: Sequence[Path]) -> Study:
    files = [_files(folder, there=True) for folder in workdirs]
    first = files[0].config
    changed = {field for run in files[1:] for field, _, _ in differences(first, run.config)}
    whole = {_whole(field) for field in changed}
    whole = {field for field in whole if not any(field.startswith(f"{other}.") for other in whole)}  # a list's length changed
    counted = sorted(field for field in whole if field.partition(".")[0] not in NO_PART_OF_A_RUN)
    values = [{field: value for field in counted if (value := _look_up(run.config, field)) is not None} for run in files]
    fields = _varied(["weighting", *counted], values)
    tasks = _tasks(files)
    names = [folder.resolve().name for folder in workdirs]
    runs = tuple(
        _run(
            run,
            name if names.count(name) == 1 else str(run.folder),
            tasks,
            fields,
            value,
            DONE if run.results else "unfinished",
        )
        for run, name, value in zip(files, names, values, strict=True)
    )
    experiments = list(dict.fromkeys(run.config["name"] for run in files))
    return _study(", ".join(experiments), files, runs, fields, tasks, {})


def _study(
    name: str,
    files: Sequence[_Files],
    runs: tuple[Run, ...],
    fields: tuple[str, ...],
    tasks: Mapping[str, str],
    index: Mapping[str, Any],
) -> Study:
    criteria = {run.config.get("evaluation", {}).get("criterion", "mean") for run in files if run.config}
    versions: Mapping[str, str] = next((run.results["versions"] for run in files if "versions" in run.results), {})
    return Study(
        name=name,
        command=index.get("command", ""),
        fields=fields,
        tasks=tasks,
        criterion=criteria.pop() if len(criteria) == 1 else "mean",
        runs=runs,
        programs=tuple(index.get("programs", ())),
        devices=index.get("devices", "") or versions.get("devices", ""),
        versions={package: version for package, version in versions.items() if package != "devices"},
    )


def _files(folder: Path, there: bool) -> _Files:
    config = read_json(folder / "config.json")
    results = read_results(folder)
    if there and (not isinstance(config, dict) or not {"tasks", "phases"} <= config.keys()):
        raise UserError(f"{folder}: no workdir of a run (its config.json is missing, or is not that of an experiment)")
    return _Files(folder, config or {}, results or {})


def _tasks(files: Sequence[_Files]) -> dict[str, str]:
    """The tasks of the run that has most of them; the others may train a part of these.

    Raises:
        UserError: One trains something else.
    """
    finished = [run for run in files if run.results] or [run for run in files if run.config][:1]
    widest = max(finished, key=lambda run: len(run.tasks), default=None)
    if widest is None:
        return {}
    for run in finished:
        if unknown := [task for task in run.tasks if task not in widest.tasks]:
            raise UserError(
                f"{run.folder}: trains {listed(unknown)}, but {widest.folder} {listed(widest.tasks)}; a report compares "
                "runs of the same tasks, or of a part of them"
            )
    return widest.tasks


def _run(
    files: _Files,
    name: str,
    tasks: Mapping[str, str],
    fields: Sequence[str],
    values: Mapping[str, Any],
    status: str,
) -> Run:
    config, results = files.config, files.results
    scored = results.get("tasks", {})
    weights = values.get("weights", config.get("weights", {}))
    method = values.get("weighting", config.get("weighting", ""))
    fixed = method == "fixed" and all(isinstance(weight, (int, float)) for weight in weights.values())
    ends = list(itertools.accumulate(phase["steps"] for phase in config.get("phases", ())))
    return Run(
        name=name,
        values={field: values[field] for field in fields if field in values},
        seed=values.get("seed", config.get("seed")),
        status=status,
        method=method,
        weights=weights if fixed else {},
        scores={split: {task: _numbers(found[split]) for task, found in scored.items()} for split in SPLITS} if scored else {},
        baselines={task: {kind: _numbers(own) for kind, own in found["baselines"].items()} for task, found in scored.items()},
        facts={key: value for key, value in results.items() if key not in ("tasks", "versions")},
        curves=of_records(read_metrics(files.folder), tasks, ends[-1] if ends else 0),
        phases=tuple(ends[:-1]),
    )


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """NaN in place of null: a metric that is not defined."""
    return {metric: math.nan if value is None else value for metric, value in metrics.items()}


def _varied(fields: Sequence[str], values: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Those of the fields that have more than one value, each once, without the seed."""
    return tuple(
        field for field in dict.fromkeys(fields) if field != "seed" and len({key(value.get(field)) for value in values}) > 1
    )


def key(value: Any) -> str:
    """A value of a field as something that can be compared."""
    return json.dumps(value, sort_keys=True)


def _whole(field: str) -> str:
    parts = field.split(".")
    ends = [end for end, part in enumerate(parts, 1) if part in BY_NAME]
    return ".".join(parts[: ends[0]]) if ends else field


def _look_up(config: Any, field: str) -> Any:
    """The value of a.b.0.c; None where there is no such field."""
    for part in field.split("."):
        if isinstance(config, dict) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        else:
            return None
    return config
