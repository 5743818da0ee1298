"""What a run ends with: baselines, results.json, the table, the figure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tabulate

from mtl_jax.core.errors import UserError, count
from mtl_jax.core.files import number_of
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples
from mtl_jax.data.row_keys import text_of
from mtl_jax.data.source import SPLITS, Source
from mtl_jax.experiment import Experiment
from mtl_jax.tasks import Task
from mtl_jax.tasks.reading import known_rows
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.evaluation import for_json, score_fixed
from mtl_jax.training.metrics_log import read_metrics

log = logging.getLogger(__name__)


def baselines(
    corpus: Corpus, sources: Sequence[Source], kind: str, features_NxH: np.ndarray | None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task: {baseline: {metric: value}}} on test; None where a metric is not defined.

    Args:
        corpus: The data.
        sources: Where it is from.
        kind: none, constant (majority class or mean; where texts are written, the first sentence of what is read), or probe
            (that, and a linear model on the features, where they are finite; where not, that is logged).
        features_NxH: For probe: the untrained trunk's vector of every example, by id.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task in corpus.tasks if kind != "none" else ():
        split = {name: corpus.splits[name][task.source] for name in SPLITS}
        scores[task.name] = {}
        constant = task.constant(split["train"], split["test"])
        if constant is not None:
            scores[task.name]["constant"] = score_fixed(task, constant, split["test"])
        if task.decodes:
            (source,) = (source for source in sources if source.name == task.source)
            rows = split["test"].data
            lead = task.lead([text_of(source, row) for row in rows], rows)
            if lead is not None:
                scores[task.name]["lead"] = lead
        if features_NxH is not None and task.level == "example":
            features = {name: features_NxH[_ids(examples)] for name, examples in split.items()}
            labels = {name: examples.labels[task.name] for name, examples in split.items()}
            lost = {name: int((~np.isfinite(rows)).any(axis=1).sum()) for name, rows in features.items()}
            if any(lost.values()):
                log.warning(
                    "task %s: no linear probe, the trunk's features of %s examples are not finite",
                    task.name,
                    ", ".join(f"{count} {name}" for name, count in lost.items() if count),
                )
                continue
            for name in ("train", "dev"):
                there = known_rows(task, split[name])
                features[name], labels[name] = features[name][there], labels[name][there]
            fitted = task.probe(features, labels)
            if fitted is not None:
                scores[task.name]["probe"] = score_fixed(task, fitted, split["test"])
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
    """
    compared = workdirs.numbers(workdirs.read_json(folder / "baselines.json") or {})
    for task in tasks:
        if any(task.metric not in scores for scores in compared.get(task.name, {}).values()):
            raise workdirs.damaged(folder / "baselines.json", f"{task.name} lacks {task.metric}")
    found = {
        "experiment": experiment.name,
        "seed": experiment.seed,
        "weighting": experiment.weighting,
        "averaging": experiment.averaging,
        **for_json(facts),
        "tasks": {
            task.name: {
                "metric": task.metric,
                "dev": for_json(scores["dev"][task.name]),
                "test": for_json(scores["test"][task.name]),
                "baselines": compared.get(task.name, {}),
                **({"signatures": signatures[task.name]} if signatures[task.name] else {}),
            }
            for task in tasks
        },
        "versions": workdirs.versions(),
    }
    records = read_metrics(folder) if figure else []
    if records and jax.process_index() == 0:  # merged runs took no steps
        from mtl_jax.core import plotting  # imported late: matplotlib takes a while

        # Before results.json, which says that the run is done.
        plotting.curves(records, [(task.name, task.metric) for task in tasks], folder / "curves.png")
    workdirs.write_json(folder / "results.json", found)
    return found


def read(folder: Path) -> dict[str, Any]:
    """results.json of a workdir.

    Raises:
        UserError: There is none, or it is not what mtl_jax wrote.
    """
    found: dict[str, Any] | None = workdirs.read_results(folder)
    if found is None:
        raise UserError(f"{folder}: no results.json; the run is not finished or this is no workdir")
    return found


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """A table() for each experiment and set of tasks among the runs, in the order in which they first occur.

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


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A markdown table of test metrics, one row a task, and a line for each baseline that was not beaten.

    What ties() with a baseline, or is the same number as it is shown, neither beats it nor loses against it.

    Args:
        runs: Contents of results.json, of one run or of several of the same experiment and tasks; several give mean ± standard
            deviation (n - 1).
    """
    tasks = runs[0]["tasks"]
    kinds = [
        kind for kind in BASELINE_NAMES if any(kind in task["baselines"] for run in runs for task in run["tasks"].values())
    ]
    rows, lost = [], []
    for name, task in tasks.items():
        metric = task["metric"]
        own = [number_of(run["tasks"][name]["test"][metric]) for run in runs]
        all_ = [run["tasks"][name]["baselines"] for run in runs]
        others = {
            kind: [number_of(found[kind][metric]) for found in all_] for kind in kinds if all(kind in found for found in all_)
        }
        rows.append([name, metric, *(_cell(others[kind]) if kind in others else "" for kind in kinds), _cell(own)])
        if np.isnan(own).any():
            lost.append(f"{name}: test {metric} is not defined (predictions or labels are constant, or not finite)")
            continue
        for kind, other in others.items():
            difference = float(np.mean(own) - np.mean(other))
            if ties(difference, _deviation(own), _deviation(other)) or _shown(own) == _shown(other):
                lost.append(f"{name}: ties with {BASELINE_NAMES[kind]} ({_cell(own)} against {_cell(other)})")
            elif difference < 0:
                lost.append(f"{name}: did not beat {BASELINE_NAMES[kind]} ({_cell(own)} against {_cell(other)})")
    header = ["task", "test metric", *(BASELINE_NAMES[kind] for kind in kinds), runs[0]["experiment"]]
    drawn = tabulate.tabulate(rows, header, tablefmt="github", disable_numparse=True)
    verdict = lost if lost else ["Beats every baseline on every task."] if kinds else []
    return "\n".join([drawn, "", *verdict, *(_ending(run) for run in runs)])


BASELINE_NAMES = {"constant": "majority / mean", "lead": "first sentence", "probe": "linear probe"}


def ties(difference: float, *deviations: float | None) -> bool:
    """Whether two means are not told apart: they are equal, or lie within one standard deviation, the larger of the two.

    Args:
        difference: Of the means.
        deviations: Of the values; None where there is one only.
    """
    return abs(difference) <= max((each or 0.0 for each in deviations), default=0.0) + 1e-9


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _shown(values: Sequence[float]) -> str:
    return f"{np.mean(values) + 0.0:.4f}"


def _cell(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "undefined"
    deviation = _deviation(values)
    return _shown(values) if deviation is None else f"{_shown(values)} ± {deviation:.4f}"


def _ending(run: dict[str, Any]) -> str:
    if "merged" in run:
        merged = f"{count(run['merged']['sources'], 'run')} merged by {run['merged']['method']}"
        criterion = number_of(run["best_criterion"])
        return f"{merged}: dev criterion {criterion:.4f}, {run['seconds']:.0f} s on {run['versions']['devices']}."
    return (
        f"Seed {run['seed']}, weighting {run['weighting']}: best step {run['best_step']} of {run['steps']}, "
        f"dev criterion {number_of(run['best_criterion']):.4f}, {run['seconds']:.0f} s on {run['versions']['devices']}."
    )
