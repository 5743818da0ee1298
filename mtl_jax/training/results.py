"""What a run ends with: baselines, results.json, the table, the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tabulate

from mtl_jax.data.examples import Corpus, Examples
from mtl_jax.data.sources import SPLITS
from mtl_jax.experiment import Experiment
from mtl_jax.tasks import Task
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.evaluation import score_one
from mtl_jax.training.logs import read_metrics


def baselines(corpus: Corpus, kind: str, features_NxH: np.ndarray | None) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {baseline: {metric: value}}} on test.

    Args:
        corpus: The data.
        kind: none, constant (majority class or mean), or probe (that, and a linear model on the features).
        features_NxH: For probe: the untrained trunk's vector of every example, by id.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task in corpus.tasks if kind != "none" else ():
        split = {name: corpus.splits[name][task.source] for name in SPLITS}
        labels = {name: examples.labels[task.name] for name, examples in split.items()}
        constant = np.broadcast_to(task.constant(labels["train"]), (len(labels["test"]), task.outputs))
        scores[task.name] = {"constant": score_one(task, constant, labels["test"])}
        if features_NxH is not None:
            features = {name: features_NxH[_ids(examples)] for name, examples in split.items()}
            scores[task.name]["probe"] = score_one(task, task.probe(features, labels), labels["test"])
    return scores


def _ids(examples: Examples) -> slice:
    return slice(examples.first_id, examples.first_id + len(examples.tokens))


def write(
    folder: Path,
    experiment: Experiment,
    tasks: Sequence[Task],
    scores: dict[str, dict[str, dict[str, float]]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Writes results.json and curves.png; returns the contents of the first.

    Args:
        folder: The workdir.
        experiment: The experiment.
        tasks: Its tasks.
        scores: {"dev" and "test": {task: {metric: value}}} of the best checkpoint.
        facts: Steps, seconds and the like.
    """
    compared = workdirs.read_json(folder / "baselines.json") or {}
    found = {
        "experiment": experiment.name,
        "seed": experiment.seed,
        "weighting": experiment.weighting,
        **facts,
        "tasks": {
            task.name: {
                "metric": task.metric,
                "dev": scores["dev"][task.name],
                "test": scores["test"][task.name],
                "baselines": compared.get(task.name, {}),
            }
            for task in tasks
        },
        "versions": workdirs.versions(),
    }
    workdirs.write_json(folder / "results.json", found)
    from mtl_jax import figures  # imported late: matplotlib takes a while

    figures.curves(read_metrics(folder), [(task.name, task.metric) for task in tasks], folder / "curves.png")
    return found


def table(found: dict[str, Any]) -> str:
    """results.json as a markdown table, one row a task, and a line for each baseline that was not beaten."""
    names = {"constant": "majority / mean", "probe": "linear probe"}
    kinds = [kind for kind in names if any(kind in task["baselines"] for task in found["tasks"].values())]
    rows, lost = [], []
    for name, task in found["tasks"].items():
        own = task["test"][task["metric"]]
        others = {kind: task["baselines"][kind][task["metric"]] for kind in kinds}
        rows.append([name, task["metric"], *(f"{others[kind]:.4f}" for kind in kinds), f"{own:.4f}"])
        lost += [f"{name}: did not beat {names[kind]} ({own:.4f} against {x:.4f})" for kind, x in others.items() if own <= x]
    header = ["task", "test metric", *(names[kind] for kind in kinds), found["experiment"]]
    drawn = tabulate.tabulate(rows, header, tablefmt="github", disable_numparse=True)
    verdict = lost if lost else ["beats every baseline on every task"] if kinds else []
    ending = (
        f"best step {found['best_step']} of {found['steps']}, dev criterion {found['best_criterion']:.4f}, "
        f"{found['seconds']:.0f} s, {found['versions']['devices']}"
    )
    return "\n".join([drawn, "", *verdict, ending])
