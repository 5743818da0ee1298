"""Reads workdirs into a Study: runs, the fields that vary between them, scores and curves."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.core.errors import UserError, listed
from mtl_jax.experiment import select
from mtl_jax.reporting.series import Series, of_records
from mtl_jax.training.copy_scores import NUMBERS, SCORES
from mtl_jax.training.experiment_json import from_json
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.run_settings import varied, varied_values
from mtl_jax.training.workdir import read_json, read_results

ABLATION = "ablation.json"  # marks a directory as an ablation, with its runs in runs/
DONE = "done"
SPLITS = ("dev", "test")

Scores = Mapping[str, Mapping[str, float]]  # {task: {metric: value}}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: Name of its workdir.
        values: {varied field: value}, without the seed.
        seed: The seed; None where no file has it.
        status: done; running, waiting or unfinished; or "diverged at step ...".
        method: The weighting rule.
        weights: {task: weight} if they are constant numbers, else empty.
        scores: {"dev" and "test": {task: {metric: value}}} of the best checkpoint; empty before it is evaluated.
        baselines: {task: {baseline: {metric: value}}} on test.
        facts: The rest of results.json.
        curves: Curves by name, from series.of_records().
        phases: The first step of every phase but the first.
        copies: {task: {"test_copies": {kind: test rows that are copies of training rows}, "test_without_copies": scores}}.
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
    copies: Mapping[str, Mapping[str, Mapping[str, float]]] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether it finished."""
        return self.status == DONE

    @property
    def diverged(self) -> bool:
        """Whether a loss or gradient was not finite."""
        return self.status.startswith("diverged")


@dataclasses.dataclass(frozen=True)
class Study:
    """The data of a report.

    Attributes:
        name: Name of the ablation, or of the runs' experiments.
        command: The command that started the ablation; empty for ordinary runs.
        fields: The varied fields in order, without the seed.
        tasks: {task: its main metric}.
        criterion: The criterion by which runs are compared on dev: evaluation.criterion, or mean where runs differ in it.
        runs: The runs, in the order given.
        programs: The entry "programs" of ablation.json.
        devices: The devices that the runs used.
        versions: {package: version} in the runs.
        labels: {task: {label: name}} of tasks whose labels have names.
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
    labels: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Files:
    """The parsed files of one run; {} for a missing file."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def tasks(self) -> dict[str, str]:
        """{task: its main metric}; from the configuration if the run is not finished."""
        if self.results:
            return {name: task["metric"] for name, task in self.results["tasks"].items()}
        where = str(self.folder / "config.json")
        return {task.name: task.metric for task in select(from_json(self.config, where)).tasks} if self.config else {}


def find(patterns: Sequence[str]) -> list[Path]:
    """The workdirs that paths and patterns name; a pattern names all runs that match it.

    Raises:
        UserError: No run matches a pattern.
    """
    workdirs: list[Path] = []
    for pattern in patterns:
        matching = [Path(pattern)]
        if glob.has_magic(pattern) and not matching[0].exists():
            matching = [Path(path) for path in sorted(glob.glob(pattern)) if (Path(path) / "config.json").exists()]
            if not matching:
                raise UserError(f"{pattern}: no workdir of a run matches")
        workdirs += matching
    return workdirs


def read(workdirs: Sequence[Path]) -> Study:
    """Reads the workdirs to report.

    Args:
        workdirs: One ablation, or workdirs of ordinary runs.

    Raises:
        UserError: The list is empty, a path is not a workdir, or the runs train different tasks.
    """
    if not workdirs:
        raise UserError("no workdir given")
    for folder in workdirs:
        if (folder / ABLATION).exists() and len(workdirs) > 1:
            raise UserError(f"{folder} is an ablation; a report is of one ablation or of ordinary runs")
    return _ablation(workdirs[0]) if (workdirs[0] / ABLATION).exists() else _ordinary(workdirs)


def _ablation(folder: Path) -> Study:
    index = read_json(folder / ABLATION)
    files = [_files(folder / "runs" / entry["run"], required=False) for entry in index["runs"]]
    axes = [field for axis in index["axes"] for field in axis["fields"]]
    others = [field for entry in index["runs"] for field in entry["values"]]
    fields = varied(["weighting", *axes, *others], [entry["values"] for entry in index["runs"]])
    tasks = _tasks(files)
    runs = tuple(
        _run(run, entry["run"], tasks, fields, entry["values"], entry["status"])
        for run, entry in zip(files, index["runs"], strict=True)
    )
    return _study(index["name"], files, runs, fields, tasks, index)


def _ordinary(workdirs: Sequence[Path]) -> Study:
    files = [_files(folder, required=True) for folder in workdirs]
    fields, values = varied_values([run.config for run in files])
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
        labels=_labels(files),
        devices=index.get("devices", "") or versions.get("devices", ""),
        versions={package: version for package, version in versions.items() if package != "devices"},
    )


def _files(folder: Path, required: bool) -> _Files:
    config = read_json(folder / "config.json")
    results = read_results(folder)
    if required and (not isinstance(config, dict) or not {"tasks", "phases"} <= config.keys()):
        raise UserError(f"{folder}: not the workdir of a run (its config.json is missing, or is not that of an experiment)")
    return _Files(folder, config or {}, results or {})


def _tasks(files: Sequence[_Files]) -> dict[str, str]:
    """The tasks of the run with most tasks; other runs may train a part of them.

    Raises:
        UserError: A run trains a task that this run does not.
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


def _labels(files: Sequence[_Files]) -> dict[str, dict[str, str]]:
    """{task: {label: name}} of tasks whose labels have names, from the first run that has read its data."""
    data: Any = next((value for run in files if (value := read_json(run.folder / "data.json"))), {"tasks": {}})
    return {name: names for name, task in data["tasks"].items() if isinstance(names := task.get("label_names"), dict) and names}


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
        scores={split: {task: _numbers(entry[split]) for task, entry in scored.items()} for split in SPLITS} if scored else {},
        baselines={
            task: {kind: _numbers(metrics) for kind, metrics in entry["baselines"].items()} for task, entry in scored.items()
        },
        facts={key: value for key, value in results.items() if key not in ("tasks", "versions")},
        curves=of_records(read_metrics(files.folder), tasks, ends[-1] if ends else 0),
        phases=tuple(ends[:-1]),
        copies={
            task: {name: _numbers(entry[name]) for name in (SCORES, NUMBERS)}
            for task, entry in scored.items()
            if SCORES in entry
        },
    )


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics, with NaN for null, which is a metric that is not defined."""
    return {metric: math.nan if value is None else value for metric, value in metrics.items()}
