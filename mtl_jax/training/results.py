"""The results of a run: baselines, results.json with its figure, and the table that compares both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import tabulate

from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.core.files import number_of
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples
from mtl_jax.data.row_keys import text_of
from mtl_jax.data.source import SPLITS, Source
from mtl_jax.experiment import Experiment, rule_name
from mtl_jax.tasks import Task
from mtl_jax.tasks.reading import known_rows
from mtl_jax.training import copy_scores, run_settings
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.evaluation import for_json, score_outputs
from mtl_jax.training.experiment_json import with_defaults
from mtl_jax.training.metrics_log import read_metrics

log = logging.getLogger(__name__)

BASELINE_NAMES = {"constant": "majority / mean", "lead": "first sentence", "probe": "linear probe"}


def compute_baselines(
    corpus: Corpus, sources: Sequence[Source], kind: str, features_NxH: np.ndarray | None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task: {baseline: {metric: value}}} on test; None where a metric is not defined.

    Args:
        corpus: The data.
        sources: The declared sources of it.
        kind: none; constant: the majority class or the mean, and for texts the first sentence of the input; or probe: these,
            and a linear model on the features. Features that are not finite are logged, and have no probe.
        features_NxH: For probe: the untrained trunk's vector of every example, by id.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task in corpus.tasks if kind != "none" else ():
        split = {name: corpus.splits[name][task.source] for name in SPLITS}
        scores[task.name] = {}
        constant = task.constant(split["train"], split["test"])
        if constant is not None:
            scores[task.name]["constant"] = score_outputs(task, constant, split["test"])
        if task.decodes:
            (source,) = (source for source in sources if source.name == task.source)
            rows = split["test"].data
            lead = task.lead([text_of(source, row) for row in rows], rows)
            if lead is not None:
                scores[task.name]["lead"] = lead
        if features_NxH is not None and task.level == "example":
            features = {name: features_NxH[_ids(examples)] for name, examples in split.items()}
            labels = {name: examples.labels[task.name] for name, examples in split.items()}
            not_finite = {name: int((~np.isfinite(rows)).any(axis=1).sum()) for name, rows in features.items()}
            if any(not_finite.values()):
                log.warning(
                    "task %s: no linear probe, the trunk's features of %s examples are not finite",
                    task.name,
                    ", ".join(f"{count} {name}" for name, count in not_finite.items() if count),
                )
                continue
            for name in ("train", "dev"):
                labelled = known_rows(task, split[name])
                features[name], labels[name] = features[name][labelled], labels[name][labelled]
            outputs = task.probe(features, labels)
            if outputs is not None:
                scores[task.name]["probe"] = score_outputs(task, outputs, split["test"])
    return for_json(scores)


def _ids(examples: Examples) -> slice:
    return slice(examples.first_id, examples.first_id + len(examples.tokens))


def write(
    folder: Path,
    experiment: Experiment,
    tasks: Sequence[Task],
    scores: dict[str, dict[str, dict[str, float]]],
    signatures: dict[str, dict[str, str]],
    facts: dict[str, Any],
    figure: bool = True,
    without_copies: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Writes results.json and curves.png; returns the contents of the first.

    Args:
        folder: The workdir.
        experiment: The experiment.
        tasks: Its tasks.
        scores: {"dev" and "test": {task: {metric: value}}} of the best checkpoint.
        signatures: {task: {metric: how it was computed}}, on test.
        facts: Steps, seconds and the like.
        figure: Whether to write curves.png.
        without_copies: {task: what copy_scores.without_copies() says of it}.
    """
    baselines = workdirs.numbers(workdirs.read_json(folder / "baselines.json") or {})
    for task in tasks:
        if any(task.metric not in metrics for metrics in baselines.get(task.name, {}).values()):
            raise workdirs.damaged(folder / "baselines.json", f"{task.name} lacks {task.metric}")
    contents = {
        "experiment": experiment.name,
        "seed": experiment.seed,
        "weighting": rule_name(experiment),
        "averaging": experiment.averaging,
        **for_json(facts),
        "tasks": {
            task.name: {
                "metric": task.metric,
                "dev": for_json(scores["dev"][task.name]),
                "test": for_json(scores["test"][task.name]),
                "baselines": baselines.get(task.name, {}),
                **without_copies.get(task.name, {}),
                **({"signatures": signatures[task.name]} if signatures[task.name] else {}),
            }
            for task in tasks
        },
        "versions": workdirs.versions(),
    }
    records = read_metrics(folder) if figure else []
    if records and jax.process_index() == 0:  # merged runs took no steps
        from mtl_jax.core import plotting  # imported late: matplotlib takes a while

        # Before results.json, which marks the run as finished.
        plotting.curves(records, [(task.name, task.metric) for task in tasks], folder / "curves.png")
    workdirs.write_json(folder / "results.json", contents)
    return contents


class RunResults(dict[str, Any]):
    """The contents of a results.json, beside the configuration of its run.

    Attributes:
        folder: The workdir.
        config: Its config.json, with fields that are newer than the run at their defaults, and of a merged run its method;
            {} where there is none.
    """

    def __init__(self, contents: Mapping[str, Any], folder: Path, config: Mapping[str, Any]):
        super().__init__(contents)
        self.folder = folder
        self.config = config


def read(folder: Path) -> RunResults:
    """results.json of a workdir.

    Raises:
        UserError: There is none, or it is not what mtl_jax wrote.
    """
    contents: dict[str, Any] | None = workdirs.read_results(folder)
    if contents is None:
        raise UserError(f"{folder}: no results.json; the run is not finished, or this is not a workdir")
    config = with_defaults(workdirs.read_json(folder / "config.json") or {})
    if config and "merged" in contents:
        record = workdirs.read_json(folder / workdirs.MERGED) or {}
        config = {**config, "merged": record.get("method", contents["merged"]["method"])}
    return RunResults(contents, folder, config)


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
        UserError: There are no runs.
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


SHOWN_TASKS = 8  # in a row of the dev table


class DevTable:
    """A table of dev scores that grows by a row with each evaluation, for the log.

    Args:
        tasks: The tasks of the run.
    """

    def __init__(self, tasks: Sequence[Task]):
        metrics = {task.name: task.metric for task in tasks[:SHOWN_TASKS]}
        self._metrics = metrics
        names = [f"{name} {metric}" for name, metric in metrics.items()]
        if len(set(metrics.values())) == 1:  # it is then in the first row alone
            names = list(metrics)
        more = [f"and {len(tasks) - len(metrics)} more"] if len(tasks) > len(metrics) else []
        self._columns = ["step", *names, *more, "criterion"]
        self._titled = False
        self._metric = next(iter(metrics.values())) if len(set(metrics.values())) == 1 else ""

    def rows(self, step: int, scores: Mapping[str, Mapping[str, float]], criterion: float, best: bool) -> list[str]:
        """The lines of an evaluation, at the first one also the title.

        Args:
            step: Steps done.
            scores: {task: {metric: value}} on dev.
            criterion: The number by which checkpoints are compared.
            best: Whether it is the best so far, which is marked by a star.
        """
        values = [f"{scores[task][metric]:.4f}" for task, metric in self._metrics.items()]
        values += [""] * (len(self._columns) - len(values) - 2)
        cells = [str(step), *values, f"{criterion:.4f}"]
        widths = [max(len(name), 7) for name in self._columns]
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        title = f"dev {self._metric}".strip()
        head = "  ".join(name.rjust(width) for name, width in zip(self._columns, widths, strict=True))
        titles = [] if self._titled else [f"{title}, * is the best so far", head]
        self._titled = True
        return [*titles, f"{row} *" if best else row]
