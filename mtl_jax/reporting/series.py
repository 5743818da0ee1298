"""Curves of metrics.jsonl over the steps, averaged so that hundreds of runs fit into a report."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.training.metrics_log import USAGE

POINTS = 60  # most points of a curve of training steps


@dataclasses.dataclass(frozen=True)
class Series:
    """A value over the steps of one run.

    Attributes:
        steps_N: i64[N], rising.
        values_N: f64[N], all finite.
    """

    steps_N: np.ndarray
    values_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Band:
    """A value over the steps of several runs: arrays of one length.

    Attributes:
        steps_N: i64[N], rising.
        mean_N: f64[N], mean over the runs that have the step.
        sd_N: f64[N], standard deviation over these runs (n - 1); 0 for a single run.
    """

    steps_N: np.ndarray
    mean_N: np.ndarray
    sd_N: np.ndarray


def of_records(records: Iterable[Mapping[str, Any]], tasks: Mapping[str, str], last: int) -> dict[str, Series]:
    """The curves of a run: loss/TASK and weight/TASK, cosine_mean, conflicts, cosine/TASK/TASK; and, on dev, dev/TASK and
    sharing/LAYER/NAME/TASK/COLUMN.

    Values of training steps are means over at most POINTS windows of equal length, each placed at the window's last step.
    Values that are not finite are left out, and so are curves without values.

    Args:
        records: Records of metrics.jsonl.
        tasks: {task: its main metric}.
        last: The planned last step of the run, so that runs with the same plan have the same windows.
    """
    train = [f"{kind}/{task}" for task in tasks for kind in ("loss", "weight")] + ["cosine_mean", "conflicts"]
    pairs_of: dict[str, list[tuple[int, float]]] = {name: [] for name in [*train, *(f"dev/{task}" for task in tasks)]}
    for record in records:
        if record["kind"] == "train":
            for name in train:
                if name in record:
                    pairs_of[name].append((record["step"], record[name]))
            for name, cosine in _cosines(record):
                pairs_of.setdefault(name, []).append((record["step"], cosine))
        elif record["kind"] == "dev":
            for task, metric in tasks.items():
                if f"{task}/{metric}" in record:
                    pairs_of[f"dev/{task}"].append((record["step"], record[f"{task}/{metric}"]))
        elif record["kind"] == USAGE:
            for name in (name for name in record if name not in ("kind", "step")):
                pairs_of.setdefault(f"sharing/{name}", []).append((record["step"], record[name]))
    width = max(1, -(-last // POINTS))
    on_dev = ("dev/", "sharing/")
    curves = {name: _windows(pairs, 1 if name.startswith(on_dev) else width) for name, pairs in pairs_of.items()}
    return {name: curve for name, curve in curves.items() if len(curve.steps_N)}


def cosine_name(first: str, second: str) -> str:
    """The name of the curve of the cosine of two tasks' gradients, in any order."""
    return "cosine/" + "/".join(sorted((first, second)))


def _cosines(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(curve, value) for each pair of tasks in a record; those without examples in the step are not in its matrix."""
    if "cosines" in record:
        tasks = [name.removeprefix("gradient_norm/") for name in record if name.startswith("gradient_norm/")]
        for (row, first), (column, second) in itertools.combinations(enumerate(tasks), 2):
            yield cosine_name(first, second), record["cosines"][row][column]


def _windows(pairs: Sequence[tuple[int, float]], width: int) -> Series:
    steps_N = np.array([step for step, _ in pairs], np.int64)
    values_N = np.array([value for _, value in pairs], np.float64)
    finite_N = np.isfinite(values_N)
    ends_N = -(-steps_N[finite_N] // width) * width
    steps_M, window_N = np.unique(ends_N, return_inverse=True)
    sums_M = np.bincount(window_N, values_N[finite_N], len(steps_M))
    return Series(steps_M, sums_M / np.bincount(window_N, minlength=len(steps_M)))


def band(curves: Sequence[Series]) -> Band:
    """Mean and standard deviation over runs at each step."""
    steps_N = np.unique(np.concatenate([curve.steps_N for curve in curves]))
    table_RxN = np.full((len(curves), len(steps_N)), np.nan)
    for row, curve in enumerate(curves):
        table_RxN[row, np.searchsorted(steps_N, curve.steps_N)] = curve.values_N
    finite_RxN = np.isfinite(table_RxN)
    n_N = finite_RxN.sum(axis=0)
    mean_N = np.where(finite_RxN, table_RxN, 0.0).sum(axis=0) / n_N
    squares_N = (np.where(finite_RxN, table_RxN - mean_N, 0.0) ** 2).sum(axis=0)
    return Band(steps_N, mean_N, np.sqrt(squares_N / np.maximum(n_N - 1, 1)))
