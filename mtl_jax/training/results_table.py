"""The table of finished runs: test scores beside baselines, a column for each setting, mean and deviation over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tabulate

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.core.files import number_of
from mtl_jax.training import copy_scores, run_settings
from mtl_jax.training.results import BASELINE_NAMES, RunResults, read


class Results(list[dict[str, Any]]):
    """The contents of several results.json; printed, the table of the command mtl-jax results."""

    def __str__(self) -> str:
        return tables(self)


def results(*workdirs: str | Path) -> Results:
    """The contents of results.json of finished runs; printed, their tables, with mean and deviation over runs that are alike.

    Runs that differ only in the seed are alike. Runs of one experiment and its tasks that differ in more are columns of one
    table.

    Raises:
        UserError: No workdir is given, or one of them has no results.json that mtl_jax wrote.

    Examples:
        >>> [run] = mtl_jax.results("runs/tiny")
        >>> run["tasks"]["coarse"]["metric"]
        'accuracy'
        >>> print(mtl_jax.results("runs/tiny"))
        | task ...
    """
    if not workdirs:
        raise UserError("no workdir given")
    return Results(read(Path(workdir)) for workdir in workdirs)


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """A table() for each experiment and set of tasks among the runs, in the order of their first run.

    Args:
        runs: Contents of results.json.

    Raises:
        UserError: `runs` is empty.
    """
    if not runs:
        raise UserError("no workdir given")
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["experiment"], tuple(run["tasks"])), []).append(run)
    return "\n\n".join(table(group) for group in groups.values())


class _Column(NamedTuple):
    """Runs that are alike, under a name that tells them apart from the others."""

    name: str
    runs: list[dict[str, Any]]

    def values(self, task: str, metric: str) -> list[float] | None:
        """The test metric of each run; None where one lacks it."""
        return _values([run["tasks"][task]["test"] for run in self.runs], metric)

    def baseline(self, task: str, metric: str, kind: str) -> list[float] | None:
        """The baseline of each run; None where one lacks it."""
        return _values([run["tasks"][task]["baselines"].get(kind, {}) for run in self.runs], metric)


def _values(scores: Sequence[Mapping[str, Any]], metric: str) -> list[float] | None:
    return [number_of(values[metric]) for values in scores] if all(metric in values for values in scores) else None


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A markdown table of test metrics, one row a task, and a line for each baseline that is not beaten.

    Runs that differ in more than the seed have a column for each setting. A mean that ties() with a baseline, or is printed as
    the same number, neither beats it nor loses to it.

    Args:
        runs: Contents of results.json, of one run or of several of the same experiment and tasks; several that are alike give
            mean ± standard deviation (n - 1).
    """
    tasks = {name: task["metric"] for name, task in runs[0]["tasks"].items()}
    columns = _columns(runs)
    kinds = [
        kind for kind in BASELINE_NAMES if any(kind in task["baselines"] for run in runs for task in run["tasks"].values())
    ]
    baselines = {name: cells for kind in kinds for name, cells in _baseline_cells(columns, tasks, kind).items()}
    rows = []
    for place, (task, metric) in enumerate(tasks.items()):
        values = [column.values(task, metric) for column in columns]
        cells = [_cell(numbers) if numbers else "" for numbers in values]
        rows.append([task, metric, *(cells[place] for cells in baselines.values()), *cells])
    header = ["task", "test metric", *baselines, *(column.name for column in columns)]
    verdicts, copied, of_runs = [], [], []
    for column in columns:
        prefix = f"{column.name}: " if len(columns) > 1 else ""
        verdicts += [f"{prefix}{line}" for line in _verdict(column, tasks)]
        lines = (copy_scores.line(name, metric, [run["tasks"][name] for run in column.runs]) for name, metric in tasks.items())
        copied += [f"{prefix}{line}" for line in lines if line]
        of_runs += [f"{prefix}{_run_line(run)}" for run in column.runs]
    markdown = tabulate.tabulate(rows, header, tablefmt="github", disable_numparse=True)
    return "\n".join([markdown, "", *verdicts, *copied, *of_runs])


def _columns(runs: Sequence[dict[str, Any]]) -> list[_Column]:
    """The runs by setting, in the order of their first run."""
    configs = [run.config if isinstance(run, RunResults) else {} for run in runs]
    if not all(configs):  # what results.json has of them
        configs = [{name: run[name] for name in ("weighting", "averaging", "merged") if name in run} for run in runs]
    fields, values = run_settings.varied_values(configs)
    groups: dict[str, list[int]] = {}
    for place, setting in enumerate(values):
        groups.setdefault(run_settings.key({field: setting.get(field) for field in fields}), []).append(place)
    if len(groups) == 1:
        return [_Column(runs[0]["experiment"], list(runs))]
    folders = [run.folder if isinstance(run, RunResults) else Path(f"run {place}") for place, run in enumerate(runs, 1)]
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
    places = list(groups.values())
    of_groups = [[names[place] for place in group] for group in places]
    labels = run_settings.labels([values[group[0]] for group in places], fields, of_groups)
    # A setting at its defaults has no value that a label could show.
    labels = [
        run_settings.run_names(group) if label == run_settings.NOTHING else label
        for label, group in zip(labels, of_groups, strict=True)
    ]
    return [_Column(label, [runs[place] for place in group]) for label, group in zip(labels, places, strict=True)]


def _baseline_cells(columns: Sequence[_Column], tasks: Mapping[str, str], kind: str) -> dict[str, list[str]]:
    """{head: a cell for each task} of a baseline: once where it is the same beside all columns, else for each of them."""
    values = [[column.baseline(task, metric, kind) for column in columns] for task, metric in tasks.items()]
    name = BASELINE_NAMES[kind]
    if all(len({_mean(numbers) for numbers in row if numbers}) < 2 for row in values):
        return {name: [next((_cell(numbers) for numbers in row if numbers), "") for row in values]}
    return {
        f"{name}, {column.name}": [_cell(numbers) if (numbers := row[place]) else "" for row in values]
        for place, column in enumerate(columns)
    }


def _verdict(column: _Column, tasks: Mapping[str, str]) -> list[str]:
    """A line for each task that lacks its metric, and for each baseline that is not beaten."""
    lines, compared = [], False
    for task, metric in tasks.items():
        values = column.values(task, metric)
        if values is None:
            present = dict.fromkeys(name for run in column.runs for name in run["tasks"][task]["test"] if name != metric)
            lines.append(f"{task}: has no test {metric}, but {listed(present)}")
            continue
        baselines = {kind: numbers for kind in BASELINE_NAMES if (numbers := column.baseline(task, metric, kind))}
        compared |= any(kind in run["tasks"][task]["baselines"] for kind in BASELINE_NAMES for run in column.runs)
        if np.isnan(values).any():
            lines.append(f"{task}: test {metric} is not defined (predictions or labels are constant, or not finite)")
            continue
        for kind, others in baselines.items():
            difference = float(np.mean(values) - np.mean(others))
            if ties(difference, _deviation(values), _deviation(others)) or _mean(values) == _mean(others):
                lines.append(f"{task}: ties with {BASELINE_NAMES[kind]} ({_cell(values)} against {_cell(others)})")
            elif difference < 0:
                lines.append(f"{task}: did not beat {BASELINE_NAMES[kind]} ({_cell(values)} against {_cell(others)})")
    return lines if lines else ["Beats every baseline on every task."] if compared else []


def ties(difference: float, *deviations: float | None) -> bool:
    """Whether two means are equal, or differ by at most one standard deviation, the larger of the two.

    Args:
        difference: Between the means.
        deviations: Of the values of each; None where there is one value only.
    """
    return abs(difference) <= max((deviation or 0.0 for deviation in deviations), default=0.0) + 1e-9


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values) + 0.0:.4f}"


def _cell(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "undefined"
    deviation = _deviation(values)
    return _mean(values) if deviation is None else f"{_mean(values)} ± {deviation:.4f}"


def _run_line(run: dict[str, Any]) -> str:
    if "merged" in run:
        merged = f"{count(run['merged']['sources'], 'run')} merged by {run['merged']['method']}"
        criterion = number_of(run["best_criterion"])
        return f"{merged}: dev criterion {criterion:.4f}, {run['seconds']:.0f} s on {run['versions']['devices']}."
    return (
        f"Seed {run['seed']}, weighting {run['weighting']}: best step {run['best_step']} of {run['steps']}, "
        f"dev criterion {number_of(run['best_criterion']):.4f}, {run['seconds']:.0f} s on {run['versions']['devices']}."
        f"{_privacy(run)}"
    )


def _privacy(run: dict[str, Any]) -> str:
    """A sentence on the epsilon of a private run."""
    if "privacy" not in run:
        return ""
    epsilon, delta = run["privacy"]["epsilon"], run["privacy"]["delta"]
    return " No privacy is guaranteed." if epsilon is None else f" Private: epsilon {epsilon:.3g} at delta {delta:g}."
